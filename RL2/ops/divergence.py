"""Sums that compare two distributions, accumulated tile by tile: p is the student's, q the teacher's.

Shapes: C tokens (rows), W columns of one tile of the vocabulary, K of the teacher's most likely tokens.

With d = log q - log p, m = beta q + (1 - beta) p and s = log m - log p = log1p(beta expm1(d)):

    KL(q || p) = sum q d        KL(p || m) = -sum p s
    KL(p || q) = -sum p d       KL(q || m) = sum q (d - s)

Where p = q, d and s are 0 in every dtype, and so are all four. Gradients with respect to the student's logits z:

    dKL(q || p)/dz_i = p_i - q_i                    djsd/dz_i = (1 - beta) p_i (-s_i - KL(p || m))
    dKL(p || q)/dz_i = p_i (-d_i - KL(p || q))      dlog p_k/dz_i = [i = k] - p_i
    dlog(sum of p outside S)/dz_i = [i not in S] p_i / (sum of p outside S) - p_i

Those with respect to the teacher's logits are the same with p and q swapped, that is with -d and 1 - beta.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from RL2.ops.tally import columns

LARGEST = 80.0
"""Bound of d in its exponential, which overflows beyond 88 in float32. There p is below e^-80 times q."""

Side = Literal["student", "teacher"]
OTHER: dict[Side, Side] = {"student": "teacher", "teacher": "student"}


def sums(logp_CW: Tensor, logq_CW: Tensor, names: frozenset[str], beta: float) -> dict[str, Tensor]:
    """Return by name the part of one tile in each divergence of `names`, [C], and for `jsd` in both of its terms."""
    found = {}
    d_CW = logq_CW - logp_CW
    p_CW, q_CW = logp_CW.exp(), logq_CW.exp()
    if "kl_teacher_student" in names:
        found["kl_teacher_student"] = _row_dot(q_CW, d_CW)
    if "kl_student_teacher" in names:
        found["kl_student_teacher"] = -_row_dot(p_CW, d_CW)
    if "jsd" in names:
        s_CW = log_mixture(d_CW, beta)
        found["kl_student_m"] = -_row_dot(p_CW, s_CW)
        found["kl_teacher_m"] = _row_dot(q_CW, d_CW.clamp_(max=LARGEST).sub_(s_CW))
    return found


def log_mixture(d_CW: Tensor, beta: float) -> Tensor:
    """Return s = log(beta q + (1 - beta) p) - log p from d = log q - log p."""
    return d_CW.clamp(max=LARGEST).expm1_().mul_(beta).log1p_()


def _row_dot(a_CW: Tensor, b_CW: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_CW, b_CW)


def outside(logp_CW: Tensor, local_CK: Tensor) -> Tensor:
    """Return a copy with -inf at the given columns of each row that are in the tile."""
    local_CK, inside_CK = columns(local_CK, logp_CW.shape[1])
    # several ids outside the tile share its first or last column, so the change must be a sum
    return logp_CW.scatter_add(1, local_CK, torch.where(inside_CK, -torch.inf, 0.0).to(logp_CW.dtype))


def pick(logp_CW: Tensor, local_CK: Tensor) -> Tensor:
    """Return the given columns of each row, [C, K]; 0 where one is outside the tile."""
    local_CK, inside_CK = columns(local_CK, logp_CW.shape[1])
    return torch.where(inside_CK, logp_CW.gather(1, local_CK), 0.0)


class Slopes(NamedTuple):
    """Gradient with respect to one side's logits, g_i = p_i (a + b d_i + c s_i) + e q_i, and terms of the top K.

    p is that side's distribution. Each is [C], and None where no field needs it.
    """

    a: Tensor
    b: Tensor | None
    c: Tensor | None
    e: Tensor | None
    beta: float
    tail: Tensor | None
    """Gradient of the log-probability of all tokens outside the top K."""
    tail_logp: Tensor | None
    top: Tensor | None
    """[C, K]: gradient of the log-probabilities of the top K."""


def slopes(side: Side, saved: dict[str, Tensor], grads: dict[str, Tensor], beta: float, factor: float) -> Slopes:
    """Return `factor` times the sum over fields f of grads[f] df/dz, z the logits of `side`.

    `saved` has the values of the divergences and tails, by name. `beta` is that of `jsd`: the teacher's share of m.
    """
    beta = beta if side == "student" else 1 - beta  # the other side's share
    own, cross, tail, top = (
        f"kl_{side}_{OTHER[side]}", f"kl_{OTHER[side]}_{side}", f"{side}_tail_logp", f"{side}_top_logp"
    )  # fmt: skip
    scaled = {name: grad * factor for name, grad in grads.items()}
    a_C = torch.zeros_like(saved[f"{side}_top"])
    if cross in scaled:
        a_C = a_C + scaled[cross]
    if own in scaled:
        a_C = a_C - scaled[own] * saved[own]
    if "jsd" in scaled:
        scaled["jsd"] = scaled["jsd"] * (1 - beta)
        a_C = a_C - scaled["jsd"] * saved[f"kl_{side}_m"]
    if tail in scaled:
        a_C = a_C - scaled[tail]
    if top in scaled:
        a_C = a_C - scaled[top].sum(-1)
    return Slopes(
        a=a_C,
        b=-scaled[own] if own in scaled else None,
        c=-scaled["jsd"] if "jsd" in scaled else None,
        e=-scaled[cross] if cross in scaled else None,
        beta=beta,
        tail=scaled.get(tail),
        tail_logp=saved.get(tail),
        top=scaled.get(top),
    )


def gradient(logp_CW: Tensor, logq_CW: Tensor, slope: Slopes, local_CK: Tensor | None) -> Tensor:
    """Return the gradient of the columns of one tile with respect to the logits of p.

    `local_CK` has the columns of the teacher's top K, if there are any.
    """
    d_CW = logq_CW - logp_CW
    g_CW = slope.a[:, None]
    if slope.c is not None:
        g_CW = log_mixture(d_CW, slope.beta).mul_(slope.c[:, None]).add_(g_CW)
    if slope.b is not None:
        g_CW = d_CW.mul_(slope.b[:, None]).add_(g_CW)
    g_CW = logp_CW.exp().mul_(g_CW)
    if slope.e is not None:
        g_CW.add_(logq_CW.exp().mul_(slope.e[:, None]))
    if local_CK is not None and slope.tail is not None:
        assert slope.tail_logp is not None
        rest_CW = outside(logp_CW, local_CK).sub_(slope.tail_logp[:, None]).exp_()
        g_CW.add_(rest_CW.mul_(slope.tail[:, None]))
    if local_CK is not None and slope.top is not None:
        at_CK, inside_CK = columns(local_CK, g_CW.shape[1])
        g_CW.scatter_add_(1, at_CK, torch.where(inside_CK, slope.top, 0.0))
    return g_CW
