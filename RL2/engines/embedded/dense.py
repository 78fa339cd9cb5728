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
from RL2.ops.causal_attention import Scoring, scored_attention

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

    def _zeros(self, like: Tensor, heads: int, size: int) -> Tensor:
        zeros = like.new_zeros(self.rows, heads, self.length, size)
        mark_dynamic(zeros, (0, 2))
        return zeros

    def _grown(self, old: Tensor, keep: int, old_length: int) -> Tensor:
        new = self._zeros(old, old.shape[1], old.shape[3])
        new[:keep, :, :old_length] = old[:keep, :, :old_length]
        return new

    def layer(self, number: int, key_TKD: Tensor, value_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer; the first pass through the model allocates them."""
        if number == len(self.layers):
            keys, values = (self._zeros(x, *x.shape[1:]) for x in (key_TKD, value_TKD))
            self.layers.append((keys, values))
        return self.layers[number]

    def attention(self, pieces: list[Piece]) -> Attend:
        return _Prefill(self, pieces)

    def decode(self, ids: list[int], positions: list[int]) -> Tensor:
        ids_R, positions_R = (torch.tensor(x, device=self.device) for x in (ids, positions))
        attend = _Decode(self, positions_R, max(positions) + 1)
        for x in (ids_R, positions_R, attend.rows_R, attend.age_R11L, attend.bias_R11L):
            mark_dynamic(x, 0)
        for x in (attend.age_R11L, attend.bias_R11L):
            mark_dynamic(x, 3)
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

    def __call__(self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scoring: Scoring) -> Tensor:
        keys, values = self.cache.layer(layer, key_TKD, value_TKD)
        keys[self.row, :, self.position] = key_TKD[self.source]
        values[self.row, :, self.position] = value_TKD[self.source]
        if self.first.start == 0:
            return self.packed(layer, query_THD, key_TKD, value_TKD, scoring)
        row, end = self.first.rows[0], self.first.end
        return attend_to_earlier(
            query_THD, keys[row, :, :end].transpose(0, 1), values[row, :, :end].transpose(0, 1), scoring
        )


class _Decode:
    """Attention of one new token in each row, at `positions_R`, over the first `length` positions."""

    def __init__(self, cache: DenseCache, positions_R: Tensor, length: int) -> None:
        self.cache, self.positions_R = cache, positions_R
        self.rows_R = torch.arange(len(positions_R), device=positions_R.device)
        self.age_R11L = positions_R[:, None, None, None] - torch.arange(length, device=positions_R.device)
        """Distance of each position from the new token; below 0 beyond it."""
        self.bias_R11L = torch.where(self.age_R11L >= 0, 0.0, -torch.inf)

    def __call__(self, layer: int, query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor, scoring: Scoring) -> Tensor:
        keys, values = self.cache.layer(layer, key_RKD, value_RKD)
        keys[self.rows_R, :, self.positions_R] = key_RKD
        values[self.rows_R, :, self.positions_R] = value_RKD
        num_rows, length = len(query_RHD), self.bias_R11L.shape[-1]
        keys_RKLD, values_RKLD = (x[:num_rows, :, :length] for x in (keys, values))
        bias_R11L = self.bias_R11L
        if scoring.window is not None:
            bias_R11L = torch.where(self.age_R11L < scoring.window, bias_R11L, -torch.inf)
        if not scoring.is_plain:
            query_RH1D, bias_R111L = query_RHD[:, :, None], bias_R11L[:, None]
            return scored_attention(query_RH1D, keys_RKLD, values_RKLD, scoring, bias_R111L).flatten(1)
        # query heads that share a key/value head form the rows of one small matrix
        query_RKGD = query_RHD.reshape(num_rows, key_RKD.shape[1], -1, query_RHD.shape[2])
        bias_R11L = bias_R11L.to(query_RHD.dtype)
        out_RKGD = F.scaled_dot_product_attention(query_RKGD, keys_RKLD, values_RKLD, bias_R11L, scale=scoring.scaling)
        return out_RKGD.flatten(1)
