"""The policy-gradient family: objectives on rollouts with advantages.

Notation: A is the advantage of the token, p_a its probability, and r = p_a / p_a_old, where p_a_old is the probability
under the old policy; on the first update of a rollout r is 1. All gradients with respect to the logits are multiples of
e_a - p, the gradient of log p_a.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from RL2.config.values import NonNegative, PositiveFloat, Range
from RL2.objectives.closed_forms import dlogp, prob
from RL2.objectives.objective import Loss, needs
from RL2.objectives.ratios import advantage_of, clamp, log_ratio, ratio, sequence_mean
from RL2.types import TokenBatch, TokenStats


def reinforce_gradient(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return the gradient of `reinforce` with respect to the logits, [T, V]."""
    return -advantage_of(batch)[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=reinforce_gradient)
def reinforce(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Return -A log p_a (Williams 1992).

    Gradient: -A (e_a - p). Zero where A = 0 or p_a = 1.
    """
    return -advantage_of(batch) * stats.logp, {}


def ppo_gradient(
    p_TV: Tensor,
    batch: TokenBatch,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Return the gradient of `ppo` with respect to the logits, [T, V]."""
    advantage_T, ratio_T = advantage_of(batch), ratio(log_ratio(prob(p_TV, batch.labels_T).log(), batch))
    free_T = ratio_T * advantage_T <= clamp(ratio_T, clip, clip_high) * advantage_T
    if dual_clip is not None:
        free_T &= (advantage_T >= 0) | (ratio_T <= dual_clip)
    return -(free_T * ratio_T * advantage_T)[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=ppo_gradient)
def ppo(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    clip: PositiveFloat = 0.2,
    clip_high: PositiveFloat | None = None,
    dual_clip: Annotated[float, Range(1, open_low=True)] | None = None,
) -> Loss:
    """Return -min(r A, clamp(r, 1 - clip, 1 + clip_high) A) (PPO, Schulman et al. 2017, equation 7).

    `clip_high` is `clip` unless it is given: 0.28 is DAPO's clip-higher (arXiv 2503.14476). With `dual_clip` the loss
    of a token with A < 0 is at most -dual_clip A (1912.09729). Gradient: -r A (e_a - p); zero where the ratio has left
    the trust region in the direction of A, where r > dual_clip and A < 0, and where A = 0 or p_a = 1.
    """
    ratio_T, advantage_T = ratio(log_ratio(stats.logp, batch)), advantage_of(batch)
    free_T, clipped_T = ratio_T * advantage_T, clamp(ratio_T, clip, clip_high) * advantage_T
    gain_T = torch.minimum(free_T, clipped_T)
    if dual_clip is not None:
        gain_T = torch.where(advantage_T < 0, torch.maximum(gain_T, dual_clip * advantage_T), gain_T)
    return -gain_T, {"clipped": (gain_T != free_T).float()}


def gspo_gradient(p_TV: Tensor, batch: TokenBatch, *, clip: float = 3e-4, clip_high: float | None = None) -> Tensor:
    """Return the gradient of `gspo` with respect to the logits, [T, V]."""
    log_ratio_T = log_ratio(prob(p_TV, batch.labels_T).log(), batch)
    ratio_T, advantage_T = ratio(sequence_mean(log_ratio_T, batch)), advantage_of(batch)
    free_T = ratio_T * advantage_T <= clamp(ratio_T, clip, clip_high) * advantage_T
    # every token's ratio holds an equal part of each log p of the sequence
    slope_T = -sequence_mean(free_T * ratio_T * advantage_T, batch)
    return slope_T[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=gspo_gradient)
def gspo(
    stats: TokenStats, batch: TokenBatch, *, clip: PositiveFloat = 3e-4, clip_high: PositiveFloat | None = None
) -> Loss:
    """Return -min(s A, clamp(s, 1 - clip, 1 + clip_high) A), s = exp(mean of log r over the actions of the sequence).

    GSPO (arXiv 2507.18071, equations 5 and 7), with 3e-4 and 4e-4 in the paper; `clip_high` is `clip` unless it is
    given. The paper averages as `actor.avg_level=sequence` does. Gradient of the sum over a sequence of n tokens:
    -s (sum of A) / n (e_a - p) at each of them, without the tokens where s has left the trust region in the direction
    of A.
    """
    ratio_T, advantage_T = ratio(sequence_mean(log_ratio(stats.logp, batch), batch)), advantage_of(batch)
    free_T, clipped_T = ratio_T * advantage_T, clamp(ratio_T, clip, clip_high) * advantage_T
    return -torch.minimum(free_T, clipped_T), {"clipped": (clipped_T < free_T).float()}


def cispo_gradient(p_TV: Tensor, batch: TokenBatch, *, ratio_min: float = 0.0, ratio_max: float = 5.0) -> Tensor:
    """Return the gradient of `cispo` with respect to the logits, [T, V]."""
    ratio_T = ratio(log_ratio(prob(p_TV, batch.labels_T).log(), batch)).clamp(ratio_min, ratio_max)
    return (-ratio_T * advantage_of(batch))[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=cispo_gradient)
def cispo(
    stats: TokenStats, batch: TokenBatch, *, ratio_min: NonNegative = 0.0, ratio_max: PositiveFloat = 5.0
) -> Loss:
    """Return -w A log p_a with the constant w = clamp(r, ratio_min, ratio_max).

    CISPO (arXiv 2506.13585, equations 4 and 5): the weight is clipped, never the update. The paper has no lower bound
    and gives no upper one; 5 is from 2510.13786. Gradient: -w A (e_a - p). Zero where A = 0 or p_a = 1.
    """
    ratio_T = ratio(log_ratio(stats.logp, batch)).detach()
    weight_T = ratio_T.clamp(ratio_min, ratio_max)
    return -weight_T * advantage_of(batch) * stats.logp, {"clipped": (weight_T != ratio_T).float()}


def sapo_gradient(p_TV: Tensor, batch: TokenBatch, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Tensor:
    """Return the gradient of `sapo` with respect to the logits, [T, V]."""
    advantage_T, ratio_T = advantage_of(batch), ratio(log_ratio(prob(p_TV, batch.labels_T).log(), batch))
    tau_T = torch.full_like(advantage_T, tau_neg).masked_fill(advantage_T > 0, tau_pos)
    gate_T = (tau_T * (ratio_T - 1)).sigmoid()
    return (-4 * gate_T * (1 - gate_T) * ratio_T * advantage_T)[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=sapo_gradient)
def sapo(stats: TokenStats, batch: TokenBatch, *, tau_pos: PositiveFloat = 1.0, tau_neg: PositiveFloat = 1.05) -> Loss:
    """Return -(4 / tau) sigmoid(tau (r - 1)) A, where tau is `tau_pos` if A > 0 and `tau_neg` otherwise.

    SAPO (arXiv 2511.20347). Gradient, with the gate g = sigmoid(tau (r - 1)): -4 g (1 - g) r A (e_a - p). It equals
    that of REINFORCE at r = 1 and decays smoothly on both sides, without a cut-off. Zero where A = 0 or p_a = 1.
    """
    ratio_T, advantage_T = ratio(log_ratio(stats.logp, batch)), advantage_of(batch)
    tau_T = torch.full_like(advantage_T, tau_neg).masked_fill(advantage_T > 0, tau_pos)
    gate_T = (tau_T * (ratio_T - 1)).sigmoid()
    return -4 / tau_T * gate_T * advantage_T, {"gate": (4 * gate_T * (1 - gate_T)).detach()}
