"""What is true of every distribution: statistics that break it are wrong, and nothing may be trained on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from RL2.types import TokenStats

SLACK = 1e-4
"""Rounding of an entropy in float32, relative to its largest value."""


def breaches(stats: TokenStats, vocabulary: int) -> dict[str, Tensor]:
    """Law -> where it does not hold, bool [T], for the laws that the statistics at hand can tell. NaN breaks them."""
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
    """The first broken law, where, and the value of the statistic that it is about; None if all hold."""
    found = breaches(stats, vocabulary)
    if not found or not torch.stack(list(found.values())).any():  # one wait for the device, not one a law
        return None
    law = next(law for law, broken_T in found.items() if broken_T.any())
    t = int(found[law].nonzero()[0, 0])
    name = next(word for word in law.split() if word in vars(stats))
    return law, t, float(getattr(stats, name)[t].detach())
