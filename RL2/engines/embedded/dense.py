"""A KV cache in one dense tensor per layer, which matrix products read without a copy.

Shapes: R rows (one running request each), K key/value heads, H query heads, D head size, L positions, T packed tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import mark_dynamic

from RL2.engines.embedded.packed import KVCache, PackedForward, Piece
from RL2.ops.attention import Attend, PackedAttention, attend_to_earlier

LENGTH_STEP = 64
"""Granularity of allocated positions."""


class DenseCache(KVCache):
    """A `KVCache` of tensors [R, K, L, D] per layer, which grow on demand.

    Memory is zeroed: a masked position has weight 0, but 0 times a NaN in raw memory is NaN.
    """

    def __init__(self, model: PackedForward, budget_bytes: float, bytes_per_position: int) -> None:
        super().__init__(model)
        self.positions = int(budget_bytes // bytes_per_position)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.rows, self.length = 0, 0

    def max_rows(self, longest: int) -> int:
        return max(0, self.positions // (longest + LENGTH_STEP) - 1)

    def add(self, row: int, length: int, like: int | None) -> bool:
        return True  # `max_rows` counts every row at its full length

    def reserve(self, lengths: list[int], keep: int, longest: int, rows: int) -> int:
        length = max(lengths)
        if length >= self.length or len(lengths) >= self.rows:
            # grow by at least a quarter, with room for the waiting requests
            old_length = self.length
            if length >= old_length:
                length = max(length, min(longest, old_length * 5 // 4))
            # one row and position more than in use: a step is compiled again where it uses all of the memory
            self.rows, self.length = rows + 1, max(old_length, (length // LENGTH_STEP + 1) * LENGTH_STEP)
            for i, pair in enumerate(self.layers):
                self.layers[i] = tuple(self._grown(old, keep, old_length) for old in pair)  # type: ignore[assignment]
        return len(lengths)

    def _zeros(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        zeros = like.new_zeros(shape)
        mark_dynamic(zeros, (0, 2))
        return zeros

    def _grown(self, old: Tensor, keep: int, old_length: int) -> Tensor:
        new = self._zeros(old, (self.rows, old.shape[1], self.length, old.shape[3]))
        new[:keep, :, :old_length] = old[:keep, :, :old_length]
        return new

    def layer(self, number: int, like_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer; the first pass through the model allocates them."""
        if number == len(self.layers):
            shape = (self.rows, like_TKD.shape[1], self.length, like_TKD.shape[2])
            self.layers.append((self._zeros(like_TKD, shape), self._zeros(like_TKD, shape)))
        return self.layers[number]

    def attention(self, pieces: list[Piece]) -> Attend:
        return _Prefill(self, pieces)

    def decode(self, ids: list[int], positions: list[int]) -> Tensor:
        ids_R, positions_R = (torch.tensor(x, device=self.device) for x in (ids, positions))
        attend = _Decode(self, positions_R, max(positions) + 1)
        for x in (ids_R, positions_R, attend.rows_R, attend.bias_R11L):
            mark_dynamic(x, 0)
        mark_dynamic(attend.bias_R11L, 3)
        return self.model.step(ids_R, positions_R, attend)

    def leave(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        if sources:
            for pair in self.layers:
                for cached in pair:
                    cached[targets, :, :length] = cached[sources, :, :length]


class _Prefill:
    """Attention of prompts, which stores keys and values in the rows of all requests that share a prompt."""

    def __init__(self, cache: DenseCache, pieces: list[Piece]) -> None:
        self.cache, self.first = cache, pieces[0]
        lengths = torch.tensor([piece.end - piece.start for piece in pieces], device=cache.device)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self.packed = PackedAttention(cu_seqlens)
        places = [
            (row, piece.start, begin, piece.end - piece.start)
            for begin, piece in zip(cu_seqlens.tolist(), pieces, strict=False)
            for row in piece.rows
        ]
        device = cache.device
        self.source = torch.cat([torch.arange(begin, begin + n, device=device) for _, _, begin, n in places])
        self.position = torch.cat([torch.arange(start, start + n, device=device) for _, start, _, n in places])
        counts = torch.tensor([n for *_, n in places], device=device)
        self.row = torch.repeat_interleave(torch.tensor([row for row, *_ in places], device=device), counts)

    def __call__(self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scaling: float) -> Tensor:
        keys, values = self.cache.layer(layer, key_TKD)
        keys[self.row, :, self.position] = key_TKD[self.source]
        values[self.row, :, self.position] = value_TKD[self.source]
        if self.first.start == 0:
            return self.packed(layer, query_THD, key_TKD, value_TKD, scaling)
        row, end = self.first.rows[0], self.first.end
        return attend_to_earlier(
            query_THD, keys[row, :, :end].transpose(0, 1), values[row, :, :end].transpose(0, 1), scaling
        )


class _Decode:
    """Attention of one new token in each row, at `positions_R`, over the first `length` positions."""

    def __init__(self, cache: DenseCache, positions_R: Tensor, length: int) -> None:
        self.cache, self.positions_R = cache, positions_R
        self.rows_R = torch.arange(len(positions_R), device=positions_R.device)
        within_R11L = torch.arange(length, device=positions_R.device) <= positions_R[:, None, None, None]
        self.bias_R11L = torch.where(within_R11L, 0.0, -torch.inf)

    def __call__(self, layer: int, query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor, scaling: float) -> Tensor:
        keys, values = self.cache.layer(layer, key_RKD)
        keys[self.rows_R, :, self.positions_R] = key_RKD
        values[self.rows_R, :, self.positions_R] = value_RKD
        num_rows, heads, size = query_RHD.shape
        length = self.bias_R11L.shape[-1]
        # query heads that share a key/value head form the rows of one small matrix
        query_RKGD = query_RHD.reshape(num_rows, key_RKD.shape[1], -1, size)
        keys_RKLD, values_RKLD = (x[:num_rows, :, :length] for x in (keys, values))
        bias_R11L = self.bias_R11L.to(query_RHD.dtype)
        out_RKGD = F.scaled_dot_product_attention(query_RKGD, keys_RKLD, values_RKLD, bias_R11L, scale=scaling)
        return out_RKGD.reshape(num_rows, heads * size)
