"""Objectives with one importance weight or one error for each sequence, beside `gspo`.

Notation as in policy_gradient.py: A is the advantage, p_a the probability of the sampled token, r = p_a / p_a_old, n
the number of actions of the sequence, and e_a - p is the gradient of log p_a. Means and sums are over the actions of
the sequence. All have the value of the sequence at each of its tokens, so `actor.avg_level=sequence` averages them as
the papers do.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from RL2.config.values import PositiveFloat, Range
from RL2.objectives.closed_forms import dlogp, prob
from RL2.objectives.objective import Loss, needs
from RL2.objectives.policy_gradient import gspo, gspo_gradient
from RL2.objectives.ratios import advantage_of, log_ratio, old_logp_of, ratio, sequence_mean, sequence_sum
from RL2.types import TokenBatch, TokenStats

LogClip = Annotated[float, Range(0, 20, open_low=True)]
"""Bound of a log ratio."""


def _limited(log_ratio_T: Tensor, batch: TokenBatch, clip: float, clip_high: float | None) -> tuple[Tensor, Tensor]:
    """Return log r, limited on the side that A pushes it to, and where the limit does not hold."""
    high = clip if clip_high is None else clip_high
    limited_T = torch.where(advantage_of(batch) > 0, log_ratio_T.clamp(max=high), log_ratio_T.clamp(min=-clip))
    return limited_T, limited_T == log_ratio_T


def gmpo_gradient(p_TV: Tensor, batch: TokenBatch, *, clip: float = 0.4, clip_high: float | None = None) -> Tensor:
    """Return the gradient of `gmpo` with respect to the logits, [T, V]."""
    log_ratio_T = log_ratio(prob(p_TV, batch.labels_T).log(), batch)
    limited_T, free_T = _limited(log_ratio_T, batch, clip, clip_high)
    ratio_T = ratio(sequence_mean(limited_T, batch))
    slope_T = -sequence_mean(ratio_T * advantage_of(batch), batch) * free_T
    return slope_T[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=gmpo_gradient)
def gmpo(stats: TokenStats, batch: TokenBatch, *, clip: LogClip = 0.4, clip_high: LogClip | None = None) -> Loss:
    """Return -s A with s = exp(mean c), where c is min(log r, clip_high) for A > 0 and max(log r, -clip) elsewhere.

    Geometric-mean policy optimisation (arXiv 2507.20673). It clips each token, in logarithms, before the
    mean; `gspo` clips the mean. `clip_high` is `clip` unless it is given; 0.4 is the paper's. Gradient of the sum over
    a sequence: -s (mean of A) (e_a - p) at each token that is not clipped, 0 at the others.
    """
    limited_T, free_T = _limited(log_ratio(stats.logp, batch), batch, clip, clip_high)
    return -ratio(sequence_mean(limited_T, batch)) * advantage_of(batch), {"clipped": (~free_T).float()}


def luspo_gradient(p_TV: Tensor, batch: TokenBatch, *, clip: float = 3e-4, clip_high: float | None = None) -> Tensor:
    """Return the gradient of `luspo` with respect to the logits, [T, V]."""
    return batch.lengths_B[batch.sequence_T][:, None] * gspo_gradient(p_TV, batch, clip=clip, clip_high=clip_high)


@needs("logp", gradient=luspo_gradient)
def luspo(
    stats: TokenStats, batch: TokenBatch, *, clip: PositiveFloat = 3e-4, clip_high: PositiveFloat | None = None
) -> Loss:
    """Return n times the loss of `gspo`: length-unbiased sequence policy optimisation (arXiv 2602.05261).

    The weight of a sequence in the sum of `gspo` does not depend on its length; here it is proportional to it. With
    `actor.avg_level=constant`, `gspo` is this objective with `actor.avg_level=sequence`, divided by
    `actor.avg_length`. Gradient: n times that of `gspo`.
    """
    loss_T, metrics = gspo(stats, batch, clip=clip, clip_high=clip_high)
    return batch.lengths_B[batch.sequence_T] * loss_T, metrics


def _kernel(
    logp_T: Tensor, batch: TokenBatch, power_pos: float, decay_pos: float, power_neg: float, decay_neg: float
) -> Tensor:
    """Return W^power exp(decay (1 - W)), where W is the product of r over the sequence, [T]."""
    log_weight_T, raises_T = sequence_sum(log_ratio(logp_T, batch), batch), advantage_of(batch) >= 0
    power_T = torch.full_like(log_weight_T, power_neg).masked_fill(raises_T, power_pos)
    decay_T = torch.full_like(log_weight_T, decay_neg).masked_fill(raises_T, decay_pos)
    return (power_T * log_weight_T + decay_T * (1 - ratio(log_weight_T))).exp()


def vespo_gradient(
    p_TV: Tensor,
    batch: TokenBatch,
    *,
    power_pos: float = 2.0,
    decay_pos: float = 3.0,
    power_neg: float = 3.0,
    decay_neg: float = 2.0,
) -> Tensor:
    """Return the gradient of `vespo` with respect to the logits, [T, V]."""
    kernel_T = _kernel(prob(p_TV, batch.labels_T).log(), batch, power_pos, decay_pos, power_neg, decay_neg)
    return (-kernel_T * advantage_of(batch))[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=vespo_gradient)
def vespo(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    power_pos: PositiveFloat = 2.0,
    decay_pos: PositiveFloat = 3.0,
    power_neg: PositiveFloat = 3.0,
    decay_neg: PositiveFloat = 2.0,
) -> Loss:
    """Return -f A log p_a with the constant f = W^c1 exp(c2 (1 - W)), where W is the product of r over the sequence.

    Variational sequence-level soft policy optimisation (arXiv 2602.10693, equation 20, with the constants of section
    4.1): c1, c2 are `power_pos`, `decay_pos` for A >= 0 and `power_neg`, `decay_neg` elsewhere. Gradient:
    -f A (e_a - p). f is 1 at W = 1, largest at W = c1 / c2, and goes to 0 as W goes to 0 or infinity. Zero where A = 0
    or p_a = 1.
    """
    kernel_T = _kernel(stats.logp.detach(), batch, power_pos, decay_pos, power_neg, decay_neg)
    return -kernel_T * advantage_of(batch) * stats.logp, {"kernel": kernel_T}


def _residual(logp_T: Tensor, batch: TokenBatch, beta: float) -> Tensor:
    """Return beta times the log-ratio of the sequence to the reference, minus its mean advantage, [T]."""
    reference_T = old_logp_of(logp_T, batch) if batch.ref_logp_T is None else batch.ref_logp_T
    return beta * sequence_sum(logp_T - reference_T, batch) - sequence_mean(advantage_of(batch), batch)


def a2po_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 1e-3) -> Tensor:
    """Return the gradient of `a2po` with respect to the logits, [T, V]."""
    residual_T = _residual(prob(p_TV, batch.labels_T).log(), batch, beta)
    slope_T = 2 * beta * residual_T * batch.lengths_B[batch.sequence_T]
    return slope_T[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=a2po_gradient, reference=True)
def a2po(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 1e-3) -> Loss:
    """Return (beta sum(log(p_a / p_a_ref)) - A)^2: regression of the log-ratio of a sequence on its advantage.

    A*-PO (arXiv 2505.20686); its advantages are those of `adv.estimator=soft_value`. The reference is the
    old policy where none is loaded. Gradient of the sum over a sequence of n tokens: 2 n beta (beta sum log(p_a /
    p_a_ref) - mean of A) (e_a - p) at each of them. Zero for a sequence with p = p_ref exp(A / beta), the optimum of
    the reward with a KL divergence of weight beta.
    """
    residual_T = _residual(stats.logp, batch, beta)
    return residual_T.square(), {"residual": residual_T.detach().abs()}
