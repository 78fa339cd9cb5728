"""Attention over packed sequences, as a function that transformers' models call.

A model whose `_attn_implementation` is `IMPLEMENTATION` calls `attend(layer, query, key, value, scaling)`, passed to
its forward as a keyword: training passes `PackedAttention`, the embedded engine its cache. Linear layers, norms and
rotary embeddings see one row of T tokens and no padding.

Shapes: T tokens of B sequences, H query heads, K key/value heads, D head size, L padded length of a block of R rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from RL2.types import Shared

IMPLEMENTATION = "rl2_packed"

_KERNEL_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""torch 2.11 wants as many key heads as query heads."""

Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer number, query_THD, key_TKD, value_TKD, scaling) -> [T, H * D]"""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attend: Attend,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, [1, heads, T, D] in, [1, T, H * D] out."""
    if sliding_window or softcap or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} uses a sliding window, logit soft-capping or attention sinks, "
            "which packed attention does not have; choose a model with plain causal attention"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(layer, query_THD, key_TKD, value_TKD, scaling)[None], None


AttentionInterface.register(IMPLEMENTATION, _attention)


Block = tuple[int, int, tuple[Tensor, Tensor]]
"""rows, padded length, (positions among the T tokens, the same tokens' places in the flattened block)"""


class PackedAttention:
    """Causal attention within each of the B sequences of a packed batch.

    On GPUs in half precision: torch's variable-length kernel. Elsewhere sequences are laid into padded blocks, sorted
    by length so that little is padding, and go through scaled_dot_product_attention.
    """

    def __init__(self, cu_seqlens: Tensor, shared: Shared | None = None, max_block_waste: float = 0.2) -> None:
        """With `shared`, queries, keys and values of its U distinct positions come in, and their results go out."""
        self.shared = shared
        self.cu_seqlens = cu_seqlens.to(torch.int32)
        self.lengths = cu_seqlens.diff().tolist()
        self.max_block_waste = max_block_waste

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        has_kernel = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        return (self._variable_length if has_kernel else self._padded)(query, key, value, scaling)

    @cached_property
    def blocks(self) -> list[Block]:
        return _blocks(self.lengths, self.cu_seqlens.long(), self.max_block_waste)

    @cached_property
    def sources(self) -> list[Tensor]:
        """Of each block, where its tokens' queries, keys and values come from."""
        positions = [position for _, _, (position, _) in self.blocks]
        return positions if self.shared is None else [self.shared.place_T[position] for position in positions]

    @cached_property
    def packed_order(self) -> Tensor:
        """Where each result stands when the blocks' tokens are laid end to end."""
        order_T = torch.cat([position for _, _, (position, _) in self.blocks]).argsort()
        return order_T if self.shared is None else order_T[self.shared.distinct_U]

    def _padded(self, query_UHD: Tensor, key_UKD: Tensor, value_UKD: Tensor, scaling: float) -> Tensor:
        parts = []
        for (rows, length, (_, place)), source in zip(self.blocks, self.sources, strict=True):
            query, key, value = (_pad(x, rows, length, source, place) for x in (query_UHD, key_UKD, value_UKD))
            out_RHLD = causal_attention(query, key, value, scaling)
            parts.append(out_RHLD.transpose(1, 2).reshape(rows * length, -1).index_select(0, place))
        return torch.cat(parts).index_select(0, self.packed_order)

    def _variable_length(self, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scaling: float) -> Tensor:
        if self.shared is not None:
            query_THD, key_TKD, value_TKD = (x[self.shared.place_T] for x in (query_THD, key_TKD, value_TKD))
        longest = max(self.lengths)
        grouped = query_THD.shape[1] != key_TKD.shape[1]
        if grouped and not _KERNEL_TAKES_GROUPS:
            key_TKD, value_TKD = (
                x.repeat_interleave(query_THD.shape[1] // x.shape[1], dim=1) for x in (key_TKD, value_TKD)
            )
        groups: dict[str, Any] = {"enable_gqa": grouped} if _KERNEL_TAKES_GROUPS else {}
        out_THD = varlen_attn(
            query_THD.contiguous(),
            key_TKD.contiguous(),
            value_TKD.contiguous(),
            self.cu_seqlens,
            self.cu_seqlens,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),
            **groups,
        )
        assert isinstance(out_THD, Tensor)
        return (out_THD if self.shared is None else out_THD[self.shared.distinct_U]).flatten(1)


def causal_attention(query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, scaling: float) -> Tensor:
    """Padded causal attention [B, H, L, D]; padding stands at the end, so causality already hides it."""
    grouped = query_BHLD.shape[1] != key_BKLD.shape[1]
    return F.scaled_dot_product_attention(
        query_BHLD, key_BKLD, value_BKLD, is_causal=True, scale=scaling, enable_gqa=grouped
    )


def _blocks(lengths: list[int], cu_seqlens: Tensor, max_waste: float) -> list[Block]:
    """Sequences grouped so that at most `max_waste` of a block is padding (blocks of a few rows may waste more)."""
    order = sorted(range(len(lengths)), key=lambda b: (lengths[b], b))
    groups: list[list[int]] = []
    for b in order:
        group = groups[-1] if groups else []
        padded = lengths[b] * (len(group) + 1)
        used = sum(lengths[i] for i in group) + lengths[b]
        if group and (used >= (1 - max_waste) * padded or len(group) < 4):
            group.append(b)
        else:
            groups.append([b])
    device = cu_seqlens.device
    starts = cu_seqlens[:-1]
    blocks: list[Block] = []
    for group in groups:
        length = lengths[group[-1]]
        counts = torch.tensor([lengths[b] for b in group], device=device)
        row_T = torch.repeat_interleave(torch.arange(len(group), device=device), counts)
        within_T = torch.arange(len(row_T), device=device) - (counts.cumsum(0) - counts)[row_T]
        position_T = starts[torch.tensor(group, device=device)][row_T] + within_T
        blocks.append((len(group), length, (position_T, row_T * length + within_T)))
    return blocks


def _pad(x_TxD: Tensor, rows: int, length: int, position: Tensor, place: Tensor) -> Tensor:
    """[T, x, D] -> [rows, x, length, D] with zeros where a row is shorter."""
    flat = x_TxD.new_zeros(rows * length, *x_TxD.shape[1:]).index_copy(0, place, x_TxD.index_select(0, position))
    return flat.view(rows, length, *x_TxD.shape[1:]).transpose(1, 2)
