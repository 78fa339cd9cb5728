"""Keys and values of the running requests, and attention over them.

Shapes: R rows (one running request each), K key/value heads, H query heads, D head size, L positions, T packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from RL2.ops.attention import PackedAttention


def bytes_per_position(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What the keys and values of one token take, over all layers."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * dtype.itemsize


class KVCache:
    """[R, K, L, D] per layer, allocated ahead; running requests take rows 0, 1, 2, ... without gaps.

    Memory is zeroed: a masked position has weight 0, but 0 times the NaN of raw memory is NaN.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.rows, self.length = 0, 0

    def reserve(self, rows: int, length: int, keep: int) -> None:
        """Room for `rows` requests of `length` positions; the first `keep` rows stay. May also give rows back."""
        if rows <= self.rows and length <= self.length:
            return
        old_length, self.rows, self.length = self.length, rows, max(length, self.length)
        for i, pair in enumerate(self.layers):
            self.layers[i] = tuple(self._grown(old, keep, old_length) for old in pair)  # type: ignore[assignment]

    def _grown(self, old: Tensor, keep: int, old_length: int) -> Tensor:
        new = old.new_zeros(self.rows, old.shape[1], self.length, old.shape[3])
        new[:keep, :, :old_length] = old[:keep, :, :old_length]
        return new

    def layer(self, number: int, like_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer; the first pass through the model makes them."""
        if number == len(self.layers):
            shape = (self.rows, like_TKD.shape[1], self.length, like_TKD.shape[2])
            self.layers.append((like_TKD.new_zeros(shape), like_TKD.new_zeros(shape)))
        return self.layers[number]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Rows `sources` take the places `targets`; nothing beyond `length` positions is in use."""
        for pair in self.layers:
            for cached in pair:
                cached[targets, :, :length] = cached[sources, :, :length]


class Prefill:
    """Attention of whole prompts, packed; their keys and values go to the rows of all requests that share a prompt."""

    def __init__(self, cache: KVCache, cu_seqlens: Tensor, rows: list[list[int]]) -> None:
        self.cache, self.attend = cache, PackedAttention(cu_seqlens)
        starts, lengths = cu_seqlens.tolist(), cu_seqlens.diff().tolist()
        places = [
            (row, start, length)
            for start, length, owners in zip(starts[:-1], lengths, rows, strict=True)
            for row in owners
        ]
        device = cu_seqlens.device
        self.source = torch.cat([torch.arange(start, start + n, device=device) for _, start, n in places])
        self.position = torch.cat([torch.arange(n, device=device) for _, _, n in places])
        counts = torch.tensor([n for _, _, n in places], device=device)
        self.row = torch.repeat_interleave(torch.tensor([row for row, _, _ in places], device=device), counts)

    def __call__(self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scaling: float) -> Tensor:
        keys, values = self.cache.layer(layer, key_TKD)
        keys[self.row, :, self.position] = key_TKD[self.source]
        values[self.row, :, self.position] = value_TKD[self.source]
        return self.attend(layer, query_THD, key_TKD, value_TKD, scaling)


class Decode:
    """Attention of one new token in each of the rows 0 to R - 1, standing at `positions_R`."""

    def __init__(self, cache: KVCache, positions_R: Tensor) -> None:
        self.cache, self.positions_R = cache, positions_R
        self.rows = torch.arange(len(positions_R), device=positions_R.device)
        self.length = int(positions_R.max()) + 1
        within = torch.arange(self.length, device=positions_R.device) <= positions_R[:, None]
        self.bias_R11L = torch.zeros(within.shape, device=within.device).masked_fill_(~within, -torch.inf)[
            :, None, None
        ]

    def __call__(self, layer: int, query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor, scaling: float) -> Tensor:
        keys, values = self.cache.layer(layer, key_RKD)
        keys[self.rows, :, self.positions_R] = key_RKD
        values[self.rows, :, self.positions_R] = value_RKD
        num_rows, heads, size = query_RHD.shape
        # query heads that share a key/value head are the rows of one small matrix
        query_RKGD = query_RHD.reshape(num_rows, key_RKD.shape[1], -1, size)
        scores = torch.matmul(query_RKGD, keys[:num_rows, :, : self.length].transpose(-1, -2)).float()
        shares = scores.mul_(scaling).add_(self.bias_R11L).softmax(-1).to(query_RHD.dtype)
        return torch.matmul(shares, values[:num_rows, :, : self.length]).reshape(num_rows, heads * size)
