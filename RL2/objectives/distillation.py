"""Distillation: the student learns from a teacher's distribution at each token of a response.

Notation: p is the student's distribution, q the teacher's, a the sampled token, and dlog p_a = e_a - p. Gradients are
with respect to the student's logits; the teacher is constant.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from RL2.config.values import Range
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
