"""Sums that define a softmax, accumulated tile by tile; the tiles may lie on several processes.

Shapes: C tokens (rows), W columns of one tile of the vocabulary, K of the largest logits.

All sums are relative to the two largest logits. With m the mode, q the distribution over the other tokens (p_i = (1 -
p_m) q_i for i != m) and d = z_m - logsumexp(the other logits):

    max_logp   = log sigmoid(d)          max_log1mp = log sigmoid(-d)
    logp       = (z_a - z_m) + max_logp
    log1mp     = max_log1mp if a = m, else log1p(-p_a), where p_a <= 1/2
    entropy    = H(Bern(p_m)) + (1 - p_m) H(q)
    sum_p2     = p_m^2 + (1 - p_m)^2 sum q_i^2

No large number is subtracted from another, so float32 keeps its relative precision up to p_m = 1 - 1e-38. The direct
formula `log(-expm1(logp))` for log1mp has errors of up to 0.3 there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FAR = -1e4
"""A log-factor whose exponential is 0 in any floating-point format; unlike -inf, it is not NaN when multiplied by 0."""


class Tally(NamedTuple):
    """Sums over the columns seen so far, each [C], where e_i = exp(z_i - second)."""

    top: Tensor
    """Largest logit."""
    mode: Tensor
    """Its token id, the smallest of equals; a float, exact up to 2^24, so that a tally is one tensor to send."""
    second: Tensor
    """Largest of the other logits."""
    sum: Tensor
    """Sum of e_i over all columns but the mode."""
    sum_z: Tensor
    """Sum of e_i (z_i - second) over all columns but the mode; for the entropy."""
    sum_sq: Tensor
    """Sum of e_i^2 over all columns but the mode; for sum_p2."""


def tally(z_CW: Tensor, start: int, scratch_CW: Tensor, *, with_z: bool, with_sq: bool) -> Tally:
    """Return the tally of one tile whose first column is token `start`. Overwrite the tile and `scratch_CW`."""
    top_C, mode_C = z_CW.max(-1)
    z_CW.scatter_(1, mode_C[:, None], -torch.inf)
    second_C = z_CW.amax(-1)
    # a tile of one column has no second logit; with its top instead, the sums become 0
    z_CW.sub_(torch.where(second_C == -torch.inf, top_C, second_C)[:, None])
    e_CW = torch.exp(z_CW, out=scratch_CW if with_z else z_CW)
    sum_C = e_CW.sum(-1)
    sum_z_C = sum_sq_C = torch.zeros_like(sum_C)
    if with_z:
        z_CW.scatter_(1, mode_C[:, None], 0.0)  # instead of -inf, which times 0 is NaN
        sum_z_C = z_CW.mul_(e_CW).sum(-1)
    if with_sq:
        sum_sq_C = e_CW.square_().sum(-1)
    return Tally(top_C, (mode_C + start).to(top_C.dtype), second_C, sum_C, sum_z_C, sum_sq_C)


def merge(a: Tally, b: Tally) -> Tally:
    """Return the tally of both parts together: the smaller of the two tops joins the other columns."""
    a_wins_C = (a.top > b.top) | ((a.top == b.top) & (a.mode < b.mode))
    loser_top_C = torch.where(a_wins_C, b.top, a.top)
    second_C = torch.maximum(torch.maximum(a.second, b.second), loser_top_C)
    shift_a_C, shift_b_C, shift_C = ((x - second_C).clamp(min=FAR) for x in (a.second, b.second, loser_top_C))
    scale_a_C, scale_b_C, scale_C = shift_a_C.exp(), shift_b_C.exp(), shift_C.exp()
    return Tally(
        top=torch.where(a_wins_C, a.top, b.top),
        mode=torch.where(a_wins_C, a.mode, b.mode),
        second=second_C,
        sum=scale_a_C * a.sum + scale_b_C * b.sum + scale_C,
        sum_z=scale_a_C * (a.sum_z + shift_a_C * a.sum) + scale_b_C * (b.sum_z + shift_b_C * b.sum) + scale_C * shift_C,
        sum_sq=scale_a_C.square() * a.sum_sq + scale_b_C.square() * b.sum_sq + scale_C.square(),
    )


class Rows(NamedTuple):
    """Statistics of C rows, each [C], computed from their complete tally; the backward pass needs them too."""

    mode: Tensor
    second: Tensor
    log_sum: Tensor
    is_mode: Tensor
    logp: Tensor
    log1mp: Tensor
    max_logp: Tensor
    max_log1mp: Tensor
    entropy: Tensor
    sum_q2: Tensor
    """Sum of q_i^2 over all tokens but the mode."""
    sum_p2: Tensor


def rows(whole: Tally, label_logit_C: Tensor, labels_C: Tensor) -> Rows:
    """Return the statistics of C rows from their whole tally, the labels' logits [C] and the labels [C]."""
    log_sum_C = whole.sum.log()
    odds_C = (whole.top - whole.second) - log_sum_C
    max_logp_C, max_log1mp_C = F.logsigmoid(odds_C), F.logsigmoid(-odds_C)
    p_mode_C, p_rest_C = max_logp_C.exp(), max_log1mp_C.exp()
    mode_C = whole.mode.long()
    is_mode_C = labels_C == mode_C
    logp_C = (label_logit_C - whole.top) + max_logp_C
    below_half_C = logp_C.clamp(max=-0.5)  # keeps log1p finite where the other branch is taken
    entropy_of_rest_C = log_sum_C - whole.sum_z / whole.sum
    sum_q2_C = whole.sum_sq / whole.sum.square()
    return Rows(
        mode=mode_C,
        second=whole.second,
        log_sum=log_sum_C,
        is_mode=is_mode_C,
        logp=logp_C,
        log1mp=torch.where(is_mode_C, max_log1mp_C, torch.log1p(-below_half_C.exp())),
        max_logp=max_logp_C,
        max_log1mp=max_log1mp_C,
        entropy=p_rest_C * (entropy_of_rest_C - max_log1mp_C) - p_mode_C * max_logp_C,
        sum_q2=sum_q2_C,
        sum_p2=p_mode_C.square() + p_rest_C.square() * sum_q2_C,
    )


class Slopes(NamedTuple):
    """Gradient with respect to the logits, g_i = e_i (a + b (z_i - second) + c e_i), except for a few tokens."""

    second: Tensor
    a: Tensor
    b: Tensor | None
    c: Tensor | None
    mode: Tensor
    at_mode: Tensor
    """Gradient of the mode, instead of the formula."""
    extra_id: Tensor
    """Token ids [C, 1 + K - 1]: the label, and those of the top K that are not the mode."""
    extra: Tensor
    """Terms added to g at `extra_id`."""

    def at(self, rows: slice | Tensor) -> Slopes:
        """Return the slopes of some rows."""
        return Slopes(*(None if x is None else x[rows] for x in self))  # type: ignore[arg-type]


def slopes(row: Rows, labels_C: Tensor, top_id_CK: Tensor | None, grads: dict[str, Tensor], factor: float) -> Slopes:
    """Return `factor` times the sum over fields f of grads[f] df/dz.

    For i other than a and m:
        dlogp/dz_i = dmax_logp/dz_i = -p_i,  dlog1mp/dz_i = p_a p_i / (1 - p_a),  dmax_log1mp/dz_i = p_m q_i,
        dH/dz_i = -p_i (log p_i + H),  dsum_p2/dz_i = 2 p_i (p_i - sum_p2),  dtop_logp_k/dz_i = [i = id_k] - p_i.
    a and m have their own terms. 1 - p is never formed by subtraction.
    """
    zero_C = torch.zeros_like(row.logp)
    logp, log1mp, max_logp, max_log1mp = (
        grads[name] * factor if name in grads else zero_C for name in ("logp", "log1mp", "max_logp", "max_log1mp")
    )
    # where a is the mode, logp is max_logp and log1mp is max_log1mp
    mode_logp_C, mode_log1mp_C = (
        on_mode + torch.where(row.is_mode, x, zero_C) for on_mode, x in ((max_logp, logp), (max_log1mp, log1mp))
    )
    label_logp_C = torch.where(row.is_mode, zero_C, logp)
    label_log1mp_C = torch.where(row.is_mode, zero_C, log1mp * (row.logp - row.log1mp).exp())
    others_logp_C = label_logp_C
    extra_id, extra = labels_C[:, None], (label_logp_C - label_log1mp_C)[:, None]
    if top_id_CK is not None and "top_logp" in grads:
        top_CK = grads["top_logp"] * factor
        mode_logp_C, others_logp_C = mode_logp_C + top_CK[:, 0], others_logp_C + top_CK[:, 1:].sum(-1)
        extra_id, extra = torch.cat([extra_id, top_id_CK[:, 1:]], -1), torch.cat([extra, top_CK[:, 1:]], -1)

    p_mode_C, p_rest_C, per_sum_C = row.max_logp.exp(), row.max_log1mp.exp(), (-row.log_sum).exp()
    a_C = p_rest_C * (label_log1mp_C - mode_logp_C - others_logp_C) + p_mode_C * mode_log1mp_C
    at_mode_C = p_rest_C * mode_logp_C + p_mode_C * (label_log1mp_C - others_logp_C - mode_log1mp_C)
    b_C = c_C = None
    if "entropy" in grads:
        scale_C = grads["entropy"] * factor * p_rest_C
        a_C = a_C - scale_C * (row.max_log1mp - row.log_sum + row.entropy)
        b_C = -scale_C * per_sum_C
        at_mode_C = at_mode_C - grads["entropy"] * factor * p_mode_C * (row.max_logp + row.entropy)
    if "sum_p2" in grads:
        scale_C = 2 * factor * grads["sum_p2"] * p_rest_C
        a_C = a_C - scale_C * row.sum_p2
        c_C = scale_C * p_rest_C * per_sum_C.square()
        at_mode_C = at_mode_C + scale_C * p_mode_C * (p_mode_C - p_rest_C * row.sum_q2)
    return Slopes(row.second, a_C * per_sum_C, b_C, c_C, row.mode, at_mode_C, extra_id, extra)


def with_gradient(slope: Slopes) -> Tensor:
    """Return the mask of the rows whose gradient is not 0 everywhere, bool [C]; NaN counts as a gradient."""
    found_C = (slope.a != 0) | (slope.at_mode != 0) | (slope.extra != 0).any(-1)
    for x_C in (slope.b, slope.c):
        found_C = found_C if x_C is None else found_C | (x_C != 0)
    return found_C


def gradient(z_CW: Tensor, start: int, scratch_CW: Tensor, slope: Slopes, dtype: torch.dtype) -> Tensor:
    """Return the gradient of the columns of one tile, in `dtype`.

    Overwrite the tile and `scratch_CW`; it may use either.
    """
    z_CW.sub_(slope.second[:, None])
    if slope.b is None and slope.c is None:
        g_CW = z_CW.exp_().mul_(slope.a[:, None])
    else:
        e_CW = torch.exp(z_CW, out=scratch_CW)
        g_CW = z_CW.mul_(slope.b[:, None]) if slope.b is not None else z_CW.zero_()
        if slope.c is not None:
            g_CW.addcmul_(e_CW, slope.c[:, None])
        g_CW.add_(slope.a[:, None]).mul_(e_CW)
    put(g_CW, slope.mode[:, None] - start, slope.at_mode[:, None])
    local, inside = columns(slope.extra_id - start, g_CW.shape[1])
    return g_CW.scatter_add_(1, local, torch.where(inside, slope.extra, 0.0)).to(dtype)


def columns(local_CK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return column indices clamped to a tile of `width`, and the mask of those inside it."""
    return local_CK.clamp(0, width - 1), (local_CK >= 0) & (local_CK < width)


def put(z_CW: Tensor, local_CK: Tensor, value_CK: Tensor) -> None:
    """Set the given columns of each row where they lie in the tile."""
    local_CK, inside_CK = columns(local_CK, z_CW.shape[1])
    z_CW.scatter_(1, local_CK, torch.where(inside_CK, value_CK, z_CW.gather(1, local_CK)))


def pick(z_CW: Tensor, local_C: Tensor) -> Tensor:
    """Return the given column of each row, [C]; 0 where it lies outside the tile."""
    local_C1, inside_C1 = columns(local_C[:, None], z_CW.shape[1])
    return torch.where(inside_C1, z_CW.gather(1, local_C1), 0.0)[:, 0]


def count_above(z_CW: Tensor, start: int, labels_C: Tensor, label_logit_C: Tensor) -> Tensor:
    """Count the columns that precede the label: a larger logit, or an equal one with a smaller id."""
    at_CW = torch.arange(start, start + z_CW.shape[1], device=z_CW.device)
    above_CW = z_CW > label_logit_C[:, None]
    above_CW |= (z_CW == label_logit_C[:, None]) & (at_CW < labels_C[:, None])
    return above_CW.sum(-1)


Top = tuple[Tensor, Tensor]
"""The K largest logits of each row and their ids, by decreasing logit and then by increasing id."""


def top(z_CW: Tensor, start: int, k: int) -> Top:
    """Return the `k` largest of one tile (all of a narrower one), exact also for ties at the k-th place."""
    k = min(k, z_CW.shape[1])
    value_CK, id_CK = z_CW.topk(k)
    last_C1 = value_CK[:, -1:]
    unsure = ((z_CW == last_C1).sum(-1) > (value_CK == last_C1).sum(-1)).nonzero()[:, 0]
    if len(unsure):  # topk picks any of the ties; a stable sort picks the first
        id_CK[unsure] = z_CW[unsure].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return ordered(value_CK, id_CK + start, k)


def ordered(value_CN: Tensor, id_CN: Tensor, k: int) -> Top:
    """Return the first `k` of N candidates, by decreasing logit and then by increasing id."""
    id_CN, by_id = id_CN.sort(-1)
    value_CN, by_value = value_CN.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return value_CN[:, :k], id_CN.gather(1, by_value)[:, :k]
