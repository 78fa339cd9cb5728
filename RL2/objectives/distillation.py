"""Distillation: the student learns from a teacher's distribution at each token of a response.

Notation: p is the student's distribution, q the teacher's, a the sampled token, and dlog p_a = e_a - p. Gradients are
with respect to the student's logits; the teacher is constant.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from RL2.config.values import NonNegative, Range
from RL2.objectives.closed_forms import bounded, dlogp, prob
from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats

Beta = Annotated[float, Range(0.001, 0.999)]
"""Share of the teacher in the mixture; at 0 and 1 the divergence is 0."""


def _own(p_TV: Tensor, other_TV: Tensor) -> Tensor:
    """Return the gradient of KL(p || other), [T, V], where `other_TV` is constant: p (log(p / other) - KL)."""
    log_ratio_TV = p_TV.log() - other_TV.log()
    return p_TV * (log_ratio_TV - (p_TV * log_ratio_TV).sum(-1, keepdim=True))


def opd_gradient(p_TV: Tensor, q_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return the gradient of `opd` with respect to the logits, [T, V]."""
    return _own(p_TV, q_TV)


@needs("kl_student_teacher", gradient=opd_gradient)
def opd(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Return KL(p || q) = sum of p_i log(p_i / q_i), over the whole vocabulary: on-policy distillation.

    Zero, with zero gradient, where p = q. Gradient: p_i (log(p_i / q_i) - KL(p || q)).
    """
    return stats.kl_student_teacher, {}


def opd_sampled_gradient(p_TV: Tensor, q_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return the gradient of `opd_sampled` with respect to the logits, [T, V]."""
    p_T, q_T = prob(p_TV, batch.labels_T), prob(q_TV, batch.labels_T)
    ratio_T = torch.ones_like(p_T) if batch.old_logp_T is None else p_T / batch.old_logp_T.exp()
    return (ratio_T * (p_T / q_T).log())[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", "teacher_logp", gradient=opd_sampled_gradient)
def opd_sampled(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Return r log(p_a / q_a), with the log-ratio constant and r = p_a / p_a under the old policy.

    Gradient: r log(p_a / q_a) dlog p_a. Its mean over tokens drawn from the old policy is that of `opd`; a single one
    is zero where p_a = q_a only. It needs one log-probability of the teacher.
    """
    old_T = stats.logp.detach() if batch.old_logp_T is None else batch.old_logp_T
    return bounded(stats.logp - old_T).exp() * (stats.logp - stats.teacher_logp).detach(), {}


def _early(advantage_T: Tensor, batch: TokenBatch, gamma: float) -> Tensor:
    """Return 1 + gamma (1 - S_t / S), [T]: S_t sums abs(advantage) over the sequence before t, and S over all of it."""
    size_T = advantage_T.abs().double()
    before_T, sequence_T = size_T.cumsum(0) - size_T, batch.sequence_T
    total_B = size_T.new_zeros(batch.num_sequences).index_add(0, sequence_T, size_T)
    first_B = before_T.new_zeros(batch.num_sequences)
    first_B[batch.lengths_B > 0] = before_T[batch.cu_seqlens[:-1][batch.lengths_B > 0]]
    share_T = (before_T - first_B[sequence_T]) / total_B.clamp(min=1e-8)[sequence_T]
    return (1 + gamma * (1 - share_T)).to(advantage_T.dtype)


def iw_opd_gradient(p_TV: Tensor, q_TV: Tensor, batch: TokenBatch, *, gamma: float = 0.5) -> Tensor:
    """Return the gradient of `iw_opd` with respect to the logits, [T, V]."""
    p_T, q_T = prob(p_TV, batch.labels_T), prob(q_TV, batch.labels_T)
    old_T = p_T.log() if batch.old_logp_T is None else batch.old_logp_T
    advantage_T = q_T.log() - old_T
    factor_T = p_T / old_T.exp() * _early(advantage_T, batch, gamma) * advantage_T
    return -factor_T[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", "teacher_logp", gradient=iw_opd_gradient)
def iw_opd(stats: TokenStats, batch: TokenBatch, *, gamma: NonNegative = 0.5) -> Loss:
    """Return -r w A with the constants A = log(q_a / p_a) under the old policy and w = 1 + gamma (1 - S_t / S).

    S_t is the sum of abs(A) over the tokens of the sequence before this one, and S over all of it: the first tokens,
    where the policy has not yet left what the teacher would write, weigh up to 1 + gamma (importance-weighted on-policy
    distillation, arXiv 2606.22600). Gradient: -r w A dlogp_a. With gamma = 0 it is `opd_sampled` on-policy.
    """
    old_T = stats.logp.detach() if batch.old_logp_T is None else batch.old_logp_T
    advantage_T = (stats.teacher_logp - old_T).detach()
    weight_T = _early(advantage_T, batch, gamma)
    return -bounded(stats.logp - old_T).exp() * weight_T * advantage_T, {"teacher_weight": weight_T}


def gkd_gradient(p_TV: Tensor, q_TV: Tensor, batch: TokenBatch, *, beta: float = 0.5) -> Tensor:
    """Return the gradient of `gkd` with respect to the logits, [T, V]."""
    return (1 - beta) * _own(p_TV, beta * q_TV + (1 - beta) * p_TV)


@needs("jsd", beta="beta", gradient=gkd_gradient)
def gkd(stats: TokenStats, batch: TokenBatch, *, beta: Beta = 0.5) -> Loss:
    """Return beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p: generalised distillation.

    At most log 2. Zero, with zero gradient, where p = q. Gradient: (1 - beta) p_i (log(p_i / m_i) - KL(p || m)).
    Divided by beta it becomes KL(q || p) as beta goes to 0, and divided by 1 - beta KL(p || q) as beta goes to 1.
    """
    return stats.jsd, {}


def forward_kl_gradient(p_TV: Tensor, q_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return the gradient of `forward_kl` with respect to the logits, [T, V]."""
    return p_TV - q_TV


@needs("kl_teacher_student", gradient=forward_kl_gradient)
def forward_kl(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Return KL(q || p) = sum of q_i log(q_i / p_i), over the whole vocabulary.

    Cross-entropy with the teacher's distribution as the target, less the teacher's entropy. Zero, with zero gradient,
    where p = q. Gradient: p - q.
    """
    return stats.kl_teacher_student, {}
