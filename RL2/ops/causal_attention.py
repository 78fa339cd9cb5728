"""Causal attention of dense blocks: with sliding windows, soft-capped scores and attention sinks.

Shapes: B sequences, H query heads, K key/value heads, G = H / K, T queries, S keys, D head size, E value size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK, SMALL_BLOCK = 1024, 128
"""Most and fewest queries that share one mask over earlier positions."""


class Scoring(NamedTuple):
    """The way from the products of a query and the keys to the weights of the values."""

    scaling: float
    """Factor of the products."""
    window: int | None = None
    """Number of positions that a query sees, up to its own; None for all earlier ones."""
    softcap: float | None = None
    """Bound c of the scores, which become c tanh(score / c)."""
    sink_H: Tensor | None = None
    """Score of each query head that takes a share of the weights and has no value."""

    @property
    def is_plain(self) -> bool:
        """True if weights are the softmax of scaled products, which torch's kernels compute."""
        return self.softcap is None and self.sink_H is None


def causal_attention(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSE: Tensor, scoring: Scoring) -> Tensor:
    """Compute causal attention, [B, H, T, E], of the last T of S positions.

    Padding is at the end, where causality hides it. Keys before the window of a block of queries are not read.
    """
    num_queries, num_keys = query_BHTD.shape[2], key_BKSD.shape[2]
    earlier = num_keys - num_queries
    out = []
    for begin, end in _query_blocks(num_queries, earlier, scoring):
        first, last = 0, earlier + end
        if scoring.window is not None:
            first = max(0, earlier + begin - scoring.window + 1)
        query, key, value = query_BHTD[:, :, begin:end], key_BKSD[:, :, first:last], value_BKSE[:, :, first:last]
        out.append(_block(query, key, value, scoring))
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def _query_blocks(num_queries: int, earlier: int, scoring: Scoring) -> list[tuple[int, int]]:
    """Split queries into blocks that have one mask each."""
    begin, size = 0, QUERY_BLOCK
    if not scoring.is_plain:  # scores are in memory: few at a time stay in the cache
        size = SMALL_BLOCK
    elif scoring.window is not None:
        size = min(QUERY_BLOCK, max(SMALL_BLOCK, scoring.window // 2))
    if earlier == 0 and scoring.is_plain:  # the first queries see all earlier positions, so they need no mask
        begin = num_queries if scoring.window is None else min(num_queries, scoring.window)
    rest = [(start, min(start + size, num_queries)) for start in range(begin, num_queries, size)]
    return [(0, begin), *rest] if begin else rest


def _block(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSE: Tensor, scoring: Scoring) -> Tensor:
    """Compute attention of queries that are the last T of S positions, with one mask."""
    num_queries, num_keys = query_BHTD.shape[2], key_BKSD.shape[2]
    if scoring.is_plain:
        is_all = num_queries == num_keys and (scoring.window is None or num_keys <= scoring.window)
        size, missing = value_BKSE.shape[-1], query_BHTD.shape[-1] - value_BKSE.shape[-1]
        if missing > 0:  # the fast kernels need equal sizes
            value_BKSE = F.pad(value_BKSE, (0, missing))
        out_BHTE = F.scaled_dot_product_attention(
            query_BHTD,
            key_BKSD,
            value_BKSE,
            attn_mask=None if is_all else _is_visible(num_queries, num_keys, scoring.window, query_BHTD.device),
            is_causal=is_all,
            scale=scoring.scaling,
            enable_gqa=query_BHTD.shape[1] != key_BKSD.shape[1],
        )
        return out_BHTE[..., :size] if missing > 0 else out_BHTE
    is_visible_TS = _is_visible(num_queries, num_keys, scoring.window, query_BHTD.device)
    return scored_attention(query_BHTD, key_BKSD, value_BKSE, scoring, torch.where(is_visible_TS, 0.0, -torch.inf))


def _is_visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys the last `num_queries` positions see, bool [T, S]."""
    age_TS = torch.arange(num_keys, device=device)[num_keys - num_queries :, None] - torch.arange(
        num_keys, device=device
    )
    return age_TS >= 0 if window is None else (age_TS >= 0) & (age_TS < window)


def scored_attention(
    query_BHTD: Tensor, key_BKSD: Tensor, value_BKSE: Tensor, scoring: Scoring, bias: Tensor
) -> Tensor:
    """Compute attention by its definition, [B, H, T, E]; `bias` is added to the scores, broadcast to [B, K, G, T, S].

    Scores and weights are float32.
    """
    kv_heads, num_queries = key_BKSD.shape[1], query_BHTD.shape[2]
    # query heads that share a key/value head form the rows of one matrix
    query_BKND = query_BHTD.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    score_BKNS = (query_BKND @ key_BKSD.mT).float() * scoring.scaling
    if scoring.softcap is not None:
        score_BKNS = scoring.softcap * torch.tanh(score_BKNS / scoring.softcap)
    score_BKGTS = score_BKNS.unflatten(2, (-1, num_queries)) + bias
    if scoring.sink_H is None:
        weight_BKGTS = score_BKGTS.softmax(-1)
    else:
        sink_KG1 = scoring.sink_H.float().view(kv_heads, -1, 1)
        total_BKGT = torch.logaddexp(score_BKGTS.logsumexp(-1), sink_KG1)
        weight_BKGTS = (score_BKGTS - total_BKGT[..., None]).exp()
    out_BKNE = weight_BKGTS.flatten(2, 3).to(value_BKSE.dtype) @ value_BKSE
    return out_BKNE.unflatten(2, (-1, num_queries)).flatten(1, 2)
