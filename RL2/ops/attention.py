"""Attention over packed sequences, in the form in which transformers' models call it.

A model whose `_attn_implementation` is `IMPLEMENTATION` calls `attend(layer, query, key, value, scoring)`, a keyword
argument of its forward. Training passes `PackedAttention`, the embedded engine its cache. Linear layers, norms and
rotary embeddings see one row of T tokens without padding.

Shapes: T tokens of B sequences, H query heads, K key/value heads, D head size, L padded length of a block of R rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from RL2.ops.causal_attention import Scoring, causal_attention
from RL2.types import SharedPrefix

IMPLEMENTATION = "rl2_packed"
IN_GRAPH = "rl2_packed_in_graph"
"""The same implementation for a model that is compiled as a whole, including its attention."""

_KERNEL_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""True if torch's kernel supports grouped-query attention; torch 2.11 needs as many key heads as query heads."""

LARGEST_HEAD = 256
"""Largest head size of torch's kernel."""

Attend = Callable[[int, Tensor, Tensor, Tensor, Scoring], Tensor]
"""Function (layer number, query_THD, key_TKD, value_TKD, scoring) -> [T, H * D]."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attend: Attend,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Implement transformers' attention interface: [1, heads, T, D] in, [1, T, H * D] out.

    `sliding_window` is the number of positions that a query sees, `s_aux` an attention sink per query head.
    models/inspection.py refuses models that pass an argument ignored here. Raise ValueError for a mask.
    """
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} has a mask")
    layer: int = module.layer_idx  # type: ignore[assignment]
    sink_H = s_aux.to_local() if isinstance(s_aux, DTensor) else s_aux
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scaling, sliding_window or None, softcap or None, sink_H)
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(layer, query_THD, key_TKD, value_TKD, scoring)[None], None


# the engine may compile the code around it; `attend` depends on the layer and would be compiled for each
AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(_attention))
AttentionInterface.register(IN_GRAPH, _attention)


def is_packed(lm: PreTrainedModel) -> bool:
    """Return whether `lm` calls packed attention; otherwise it runs row by row through its own forward."""
    return lm.config._attn_implementation in (IMPLEMENTATION, IN_GRAPH)


MAX_PADDING = 16
"""Tokens of padding that cost less than another block; a sequence joins a block of longer ones within this limit."""


class Blocks:
    """Right-padded blocks of B packed sequences of similar length: every token has a place in a row of its sequence."""

    def __init__(self, cu_seqlens: Tensor, max_padding: int = MAX_PADDING, max_share: float = 0.0) -> None:
        """Plan blocks whose rows have at most `max_padding` tokens of padding, or `max_share` of their length."""
        self.cu_seqlens = cu_seqlens
        self.lengths: list[int] = cu_seqlens.diff().tolist()
        self.max_padding, self.max_share = max_padding, max_share

    @cached_property
    def blocks(self) -> list[list[int]]:
        """Sequences by decreasing length, split into blocks; the first of a block is its longest."""
        blocks: list[list[int]] = []
        for b in sorted(range(len(self.lengths)), key=lambda b: -self.lengths[b]):
            longest = self.lengths[blocks[-1][0]] if blocks else 0
            if blocks and longest - self.lengths[b] <= max(self.max_padding, int(self.max_share * longest)):
                blocks[-1].append(b)
            else:
                blocks.append([b])
        return blocks

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and padded length of each block."""
        return [(len(block), self.lengths[block[0]]) for block in self.blocks]

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Token at each of the P places of all blocks, [P], and the place of each token, [T].

        A shorter row repeats its last token. No other position depends on the copies and their results are dropped, so
        their gradients are 0.
        """
        device = self.cu_seqlens.device
        row_B = torch.tensor([b for block in self.blocks for b in block], device=device)
        padded_B = torch.tensor([length for rows, length in self.shapes for _ in range(rows)], device=device)
        length_B, start_B = self.cu_seqlens.diff()[row_B].long(), self.cu_seqlens[:-1][row_B].long()
        begin_B = padded_B.cumsum(0) - padded_B
        row_P = torch.repeat_interleave(torch.arange(len(row_B), device=device), padded_B)
        within_P = torch.arange(len(row_P), device=device) - begin_B[row_P]
        token_P = start_B[row_P] + torch.minimum(within_P, length_B[row_P] - 1)
        place_T = torch.empty(sum(self.lengths), dtype=torch.long, device=device)
        real_P = within_P < length_B[row_P]
        place_T[token_P[real_P]] = real_P.nonzero()[:, 0]
        return token_P, place_T


class PackedAttention(Blocks):
    """Causal attention within each of the B sequences of a packed batch.

    On GPUs in half precision it calls torch's variable-length kernel, except for soft-capping and sinks. Otherwise
    sequences of similar length are padded into blocks.
    """

    def __init__(self, cu_seqlens: Tensor, shared: SharedPrefix | None = None, max_padding: int = MAX_PADDING) -> None:
        """Set up attention for one batch. With `shared`, inputs and results are those of its U distinct positions."""
        super().__init__(cu_seqlens.to(torch.int32), max_padding)
        self.shared = shared

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        by_kernel = _has_kernel(query, value, scoring)
        return (self._variable_length if by_kernel else self._padded)(query, key, value, scoring)

    @cached_property
    def layout(self) -> tuple[Tensor, Tensor]:
        """Input at each of the P places of all blocks, [P], and the place of each result, [T] or [U]."""
        token_P, place_T = self.places
        if self.shared is None:
            return token_P, place_T
        return self.shared.place_T[token_P], place_T[self.shared.distinct_U]

    def _padded(self, query_UHD: Tensor, key_UKD: Tensor, value_UKD: Tensor, scoring: Scoring) -> Tensor:
        token_P, place_U = self.layout
        sizes = [rows * length for rows, length in self.shapes]
        places = zip(*(x.index_select(0, token_P).split(sizes) for x in (query_UHD, key_UKD, value_UKD)), strict=True)
        results = []
        for shape, block in zip(self.shapes, places, strict=True):
            query, key, value = (x.unflatten(0, shape).transpose(1, 2) for x in block)
            out_RHLD = causal_attention(query, key, value, scoring)
            results.append(out_RHLD.transpose(1, 2).flatten(2).flatten(0, 1))
        return torch.cat(results).index_select(0, place_U)

    def _variable_length(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scoring: Scoring) -> Tensor:
        if self.shared is not None:
            query_THD, key_TKD, value_TKD = (x[self.shared.place_T] for x in (query_THD, key_TKD, value_TKD))
        cu_seqlens, longest = self.cu_seqlens, max(self.lengths)
        out_THD = _by_kernel(query_THD, key_TKD, value_TKD, (cu_seqlens, cu_seqlens), (longest, longest), scoring)
        return (out_THD if self.shared is None else out_THD[self.shared.distinct_U]).flatten(1)


def _has_kernel(query_THD: Tensor, value_TKD: Tensor, scoring: Scoring) -> bool:
    size = query_THD.shape[-1]
    is_half = query_THD.is_cuda and query_THD.dtype in (torch.bfloat16, torch.float16)
    return is_half and scoring.is_plain and value_TKD.shape[-1] == size <= LARGEST_HEAD


def _by_kernel(
    query_THD: Tensor,
    key_SKD: Tensor,
    value_SKD: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scoring: Scoring,
) -> Tensor:
    """Call torch's kernel; `cu_seqlens` and `longest` are pairs for queries and keys.

    If a sequence has more keys than queries, the queries are its last positions.
    """
    grouped = query_THD.shape[1] != key_SKD.shape[1]
    if grouped and not _KERNEL_TAKES_GROUPS:
        key_SKD, value_SKD = (
            x.repeat_interleave(query_THD.shape[1] // x.shape[1], dim=1) for x in (key_SKD, value_SKD)
        )
    groups: dict[str, Any] = {"enable_gqa": grouped} if _KERNEL_TAKES_GROUPS else {}
    out_THD = varlen_attn(
        query_THD.contiguous(),
        key_SKD.contiguous(),
        value_SKD.contiguous(),
        *cu_seqlens,
        *longest,
        scale=scoring.scaling,
        # the kernel counts the positions before the query's own
        window_size=(-1 if scoring.window is None else scoring.window - 1, 0),
        **groups,
    )
    assert isinstance(out_THD, Tensor)
    return out_THD


def attend_to_earlier(query_THD: Tensor, key_SKD: Tensor, value_SKD: Tensor, scoring: Scoring) -> Tensor:
    """Compute causal attention of the last T of the S positions of one sequence, [T, H * D]."""
    if _has_kernel(query_THD, value_SKD, scoring):
        num_queries, num_keys = len(query_THD), len(key_SKD)
        cu_query, cu_key = (
            torch.tensor([0, n], dtype=torch.int32, device=query_THD.device) for n in (num_queries, num_keys)
        )
        longest = (num_queries, num_keys)
        return _by_kernel(query_THD, key_SKD, value_SKD, (cu_query, cu_key), longest, scoring).flatten(1)
    query_1HTD, key_1KSD, value_1KSD = (x.transpose(0, 1)[None] for x in (query_THD, key_SKD, value_SKD))
    return causal_attention(query_1HTD, key_1KSD, value_1KSD, scoring)[0].transpose(0, 1).flatten(1)
