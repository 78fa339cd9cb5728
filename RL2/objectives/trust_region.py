"""Trust regions that are not a clipped ratio: divergences of the sampled token, and quadratic penalties.

Notation as in policy_gradient.py: A is the advantage, p_a the probability of the sampled token, r = p_a / p_a_old, and
e_a - p is the gradient of log p_a.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from RL2.config.values import PositiveFloat
from RL2.objectives.closed_forms import dlogp, others, prob
from RL2.objectives.objective import Loss, needs
from RL2.objectives.ratios import advantage_of, log_ratio, old_logp_of, ratio
from RL2.types import TokenBatch, TokenStats

Divergence = Literal["tv", "kl"]


def importance_sampling_gradient(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return the gradient of `importance_sampling` with respect to the logits, [T, V]."""
    ratio_T = ratio(log_ratio(prob(p_TV, batch.labels_T).log(), batch))
    return (-ratio_T * advantage_of(batch))[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=importance_sampling_gradient)
def importance_sampling(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Return -r A, the surrogate of a policy gradient without any trust region (PPO, 1707.06347, equation 6).

    M2PO (arXiv 2510.01161) is this objective on the tokens that `actor.select.second_moment` keeps. Gradient:
    -r A (e_a - p), whose mean over tokens drawn from the old policy is the policy gradient. Zero where A = 0 or
    p_a = 1.
    """
    ratio_T = ratio(log_ratio(stats.logp, batch))
    return -ratio_T * advantage_of(batch), {"ratio": ratio_T.detach()}


def _inside(
    logp_T: Tensor,
    log1mp_T: Tensor,
    batch: TokenBatch,
    divergence: Divergence,
    delta: float,
    delta_high: float | None,
) -> Tensor:
    """Return where Bern(p_a) is within the region around Bern(p_a_old), or moves towards it, bool [T]."""
    old_logp_T = old_logp_of(logp_T, batch).clamp(max=0)
    p_T, old_T, old_rest_T = logp_T.exp(), old_logp_T.exp(), -torch.expm1(old_logp_T)
    raises_T = advantage_of(batch) > 0
    if divergence == "tv":
        distance_T = (p_T - old_T).abs()
    else:
        distance_T = old_T * (old_logp_T - logp_T) + torch.xlogy(old_rest_T, old_rest_T) - old_rest_T * log1mp_T
    limit_T = torch.full_like(distance_T, delta).masked_fill(raises_T, delta if delta_high is None else delta_high)
    return (distance_T <= limit_T) | torch.where(raises_T, p_T <= old_T, p_T >= old_T)


def dppo_gradient(
    p_TV: Tensor,
    batch: TokenBatch,
    *,
    divergence: Divergence = "tv",
    delta: float = 0.15,
    delta_high: float | None = None,
    ratio_max: float | None = None,
) -> Tensor:
    """Return the gradient of `dppo` with respect to the logits, [T, V]."""
    logp_T, log1mp_T = prob(p_TV, batch.labels_T).log(), others(p_TV, batch.labels_T).log()
    inside_T = _inside(logp_T, log1mp_T, batch, divergence, delta, delta_high)
    weight_T = ratio(log_ratio(logp_T, batch)).clamp(max=math.inf if ratio_max is None else ratio_max) * inside_T
    return (-weight_T * advantage_of(batch))[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", "log1mp", gradient=dppo_gradient)
def dppo(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    divergence: Divergence = "tv",
    delta: PositiveFloat = 0.15,
    delta_high: PositiveFloat | None = None,
    ratio_max: PositiveFloat | None = None,
) -> Loss:
    """Return -M w A log p_a, with constants: M is 1 inside the trust region and 0 outside, w = min(r, ratio_max).

    DPPO with its binary divergences (arXiv 2602.04879; the loss is that of verl's `dppo_tv` and `dppo_kl`). Outside
    means that D(Bern(p_a_old), Bern(p_a)) is above `delta` and p_a has moved in the direction of A. D is the total
    variation |p_a - p_a_old| or KL(Bern(p_a_old) || Bern(p_a)); 0.15 is the authors' limit for `tv`, and 0.05 for `kl`.
    `delta_high`, for A > 0, is `delta` unless it is given. Gradient: -M w A (e_a - p). Zero outside the region, and
    where A = 0 or p_a = 1.
    """
    inside_T = _inside(stats.logp.detach(), stats.log1mp.detach(), batch, divergence, delta, delta_high)
    ratio_T = ratio(log_ratio(stats.logp, batch)).detach()
    weight_T = ratio_T.clamp(max=math.inf if ratio_max is None else ratio_max) * inside_T
    return -weight_T * advantage_of(batch) * stats.logp, {"clipped": (~inside_T).float()}


def dro_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.05) -> Tensor:
    """Return the gradient of `dro` with respect to the logits, [T, V]."""
    log_ratio_T = log_ratio(prob(p_TV, batch.labels_T).log(), batch)
    return (beta * log_ratio_T - advantage_of(batch))[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=dro_gradient)
def dro(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.05) -> Loss:
    """Return -A log p_a + beta (log r)^2 / 2: direct reward optimisation, token by token, without a value model.

    Richemond et al., arXiv 2405.19107, with the old policy as the reference, in the form of Tinker's `dro`.
    It needs no importance weight. Gradient: (beta log r - A) (e_a - p). Zero at r = exp(A / beta), the fixed point,
    and where p_a = 1.
    """
    log_ratio_T = log_ratio(stats.logp, batch)
    return beta / 2 * log_ratio_T.square() - advantage_of(batch) * stats.logp, {"log_ratio": log_ratio_T.detach()}
