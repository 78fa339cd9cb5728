"""What stands around every objective without a line in it: divergence from a reference, and the engine-trainer gap."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def kl_estimate(logp_T: Tensor, ref_logp_T: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(policy || reference) at the sampled token (Schulman, "Approximating KL divergence").

    With d = log p_ref - log p: k1 = -d (unbiased), k2 = d^2 / 2 (its gradient is that of the KL), k3 = e^d - 1 - d
    (unbiased and never negative).
    """
    d_T = ref_logp_T - logp_T
    if estimator == "k1":
        return -d_T
    if estimator == "k2":
        return d_T.square() / 2
    return torch.expm1(d_T) - d_T


def importance_weight(logp_T: Tensor, engine_logp_T: Tensor, cap: float) -> Tensor:
    """min(p / p_engine, cap), without gradient: corrects for tokens drawn from the engine's slightly other numbers.

    Truncated importance sampling (Ionides 2008); `logp_T` is the trainer's log-probability when the rollout arrived.
    """
    return (logp_T.detach() - engine_logp_T).exp().clamp(max=cap)
