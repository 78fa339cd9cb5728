"""Objectives on the order of the vocabulary (thesis, section 4.3).

Notation: p_1 >= p_2 >= ... are the policy's probabilities by rank, equals by rising id, and r is the rank of the
sampled token. The target q, a constant, moves the probability of rank 1 to the sampled token and shifts those before it
down by one: q_r = p_1, and q_i = p_(i+1) for i < r. On ranks 1 to r it is a permutation of p; beyond, it is p.

Only the `rank_cap` most likely tokens are read. A token of higher rank has loss 0 and gradient 0, still counts in the
average, and lowers the metric `covered`, the share of tokens within the cap. A token outside the first 32 is rare (it
has less than 1/32 of the probability), and 32 log-probabilities take little memory compared with the hidden state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from RL2.config.values import Count, NonNegative
from RL2.objectives.closed_forms import dlogp, js_summand
from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats

RANK_CAP = 32


def _target(by_rank_TK: Tensor, is_label_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities (or their logarithms) of the target by rank, and True on ranks 1 to r, both [T, K].

    A label that is not among the K counts as rank 1: nothing moves.
    """
    r_T1 = is_label_TK.long().argmax(-1, keepdim=True) + 1
    rank_K = torch.arange(1, by_rank_TK.shape[1] + 1, device=by_rank_TK.device)
    target_TK = torch.where(rank_K == r_T1, by_rank_TK[:, :1], by_rank_TK.roll(-1, dims=1))
    return target_TK, rank_K <= r_T1


def _logs(stats: TokenStats, batch: TokenBatch, rank_cap: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return log p and log q by rank, [T, K], both 0 beyond rank r; and the metric."""
    logp_TK = stats.top_logp[:, :rank_cap]
    is_label_TK = stats.top_id[:, :rank_cap] == batch.labels_T[:, None]
    logq_TK, inside_TK = _target(logp_TK.detach(), is_label_TK)
    covered = {"covered": is_label_TK.any(-1).float()}
    return logp_TK.masked_fill(~inside_TK, 0.0), logq_TK.masked_fill(~inside_TK, 0.0), covered


def _dense(p_TV: Tensor, labels_T: Tensor, rank_cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return p and q by rank, and the token id of each rank, all [T, V]."""
    by_rank_TV, id_TV = p_TV.sort(dim=-1, descending=True, stable=True)
    is_label_TV = id_TV == labels_T[:, None]
    is_label_TV[:, rank_cap:] = False
    target_TV, inside_TV = _target(by_rank_TV, is_label_TV)
    return by_rank_TV, torch.where(inside_TV, target_TV, by_rank_TV), id_TV


def rank_kl_gradient(p_TV: Tensor, batch: TokenBatch, *, rank_cap: int = RANK_CAP) -> Tensor:
    """Return the gradient of `rank_kl` with respect to the logits, [T, V]."""
    p_rank_TV, q_rank_TV, id_TV = _dense(p_TV, batch.labels_T, rank_cap)
    return torch.zeros_like(p_TV).scatter(1, id_TV, p_rank_TV - q_rank_TV)


@needs("top_logp", "top_id", top_k="rank_cap", gradient=rank_kl_gradient)
def rank_kl(stats: TokenStats, batch: TokenBatch, *, rank_cap: Count = RANK_CAP) -> Loss:
    """Return the generalised KL(q || p) = sum over i <= r of q_i log(q_i / p_i) - q_i + p_i.

    Zero, with zero gradient, at r = 1 (and where p_1 = ... = p_r). Gradient: p - q, which is 0 for ranks beyond r,
    because the sums of p and q over ranks 1 to r are equal.
    """
    logp_TK, logq_TK, covered = _logs(stats, batch, rank_cap)
    p_TK, q_TK = logp_TK.exp(), logq_TK.exp()
    return (q_TK * (logq_TK - logp_TK) - q_TK + p_TK).sum(-1), covered


def rank_jsd_gradient(p_TV: Tensor, batch: TokenBatch, *, rank_cap: int = RANK_CAP, ce_coef: float = 0.0) -> Tensor:
    """Return the gradient of `rank_jsd` with respect to the logits, [T, V]."""
    p_rank_TV, q_rank_TV, id_TV = _dense(p_TV, batch.labels_T, rank_cap)
    g_TV = p_rank_TV * (2 * p_rank_TV / (p_rank_TV + q_rank_TV)).log() / 2
    jsd_TV = torch.zeros_like(p_TV).scatter(1, id_TV, g_TV - p_rank_TV * g_TV.sum(-1, keepdim=True))
    return jsd_TV - ce_coef * dlogp(p_TV, batch.labels_T)


@needs("logp", "top_logp", "top_id", top_k="rank_cap", gradient=rank_jsd_gradient)
def rank_jsd(stats: TokenStats, batch: TokenBatch, *, rank_cap: Count = RANK_CAP, ce_coef: NonNegative = 0.0) -> Loss:
    """Return JSD(p, q) over i <= r: sum of p_i log(p_i / m_i) / 2 + q_i log(q_i / m_i) / 2, with m = (p + q) / 2.

    `ce_coef` adds this multiple of the cross-entropy, -log p_a, of every token, also beyond the cap (section 4.4).

    At most log 2. Zero, with zero gradient, at r = 1 (and where p_1 = ... = p_r). Gradient, with
    g_i = p_i log(p_i / m_i) / 2 for i <= r and 0 beyond: g_j - p_j sum_i g_i. For the sampled token it vanishes as p_r
    goes to 0, while that of `rank_kl` goes to -p_1.
    """
    logp_TK, logq_TK, covered = _logs(stats, batch, rank_cap)
    # where p = q, some devices would leave the rounding error of log 2
    jsd_T = js_summand(logp_TK, logq_TK).masked_fill(logp_TK == logq_TK, 0.0).sum(-1)
    return (jsd_T - ce_coef * stats.logp if ce_coef else jsd_T), covered
