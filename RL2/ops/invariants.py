"""Invariants of every distribution. Statistics that break one are wrong, and training on them must stop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from RL2.types import TokenStats

SLACK = 1e-4
"""Tolerance of an entropy in float32, relative to its largest value."""


def breaches(stats: TokenStats, vocabulary: int) -> dict[str, Tensor]:
    """Return invariant -> mask of the tokens that break it, bool [T], for the statistics at hand. NaN breaks each."""
    here = vars(stats)
    logs = [name for name in ("logp", "log1mp", "max_logp", "max_log1mp") if name in here]
    found = {f"-inf < {name} <= 0": ~((here[name] <= 0) & here[name].isfinite()) for name in logs}
    if "logp" in here and "max_logp" in here:
        found["logp <= max_logp"] = ~(here["logp"] <= here["max_logp"])
    if "entropy" in here:
        most, entropy_T = math.log(vocabulary), here["entropy"]
        found["0 <= entropy <= ln V"] = ~((entropy_T >= -SLACK * most) & (entropy_T <= (1 + SLACK) * most))
    return found


def first_breach(stats: TokenStats, vocabulary: int) -> tuple[str, int, float] | None:
    """Return the first broken invariant, the index of its token, and the value of its statistic; None if all hold."""
    found = breaches(stats, vocabulary)
    # one synchronisation with the device for all of them
    if not found or not torch.stack(list(found.values())).any():
        return None
    invariant = next(name for name, broken_T in found.items() if broken_T.any())
    t = int(found[invariant].nonzero()[0, 0])
    name = next(word for word in invariant.split() if word in vars(stats))
    return invariant, t, float(getattr(stats, name)[t].detach())
