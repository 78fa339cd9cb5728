"""A KV cache in one dense tensor per layer, which matrix products read without a copy.

A layer with a sliding window of W positions keeps the last W alone: position p is at place p % W, over p - W.

Shapes: R rows (one running request each), K key/value heads, H query heads, D head size, L places, T packed tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import mark_dynamic

from RL2.engines.embedded.packed import KVCache, PackedForward, Piece
from RL2.engines.memory import bytes_per_row
from RL2.ops.attention import Attend, PackedAttention, attend_to_earlier
from RL2.ops.causal_attention import Scoring, scored_attention

LENGTH_STEP = 64
"""Granularity of allocated positions."""


class DenseCache(KVCache):
    """A `KVCache` of tensors [R, K, L, D] per layer, which grow on demand.

    Memory is zeroed: a masked position has weight 0, but 0 times a NaN in raw memory is NaN.
    """

    def __init__(self, model: PackedForward, budget_bytes: float) -> None:
        super().__init__(model)
        self.budget_bytes = budget_bytes
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.rows, self.length = 0, 0

    def max_rows(self, longest: int) -> int:
        lm, kept = self.model.lm, {number: window + 1 for number, window in self.model.windows.items()}
        return max(0, int(self.budget_bytes // bytes_per_row(lm.config, lm.dtype, kept, longest + LENGTH_STEP)) - 1)

    def add(self, row: int, length: int, like: int | None) -> bool:
        return True  # `max_rows` counts every row at its full length

    def reserve(self, lengths: list[int], keep: int, longest: int, rows: int) -> int:
        length = max(lengths)
        if length >= self.length or len(lengths) >= self.rows:
            # grow by at least a quarter, with room for the waiting requests
            if length >= self.length:
                length = max(length, min(longest, self.length * 5 // 4))
            # one row and position more than in use: a step is compiled again where it uses all of the memory
            self.rows, self.length = rows + 1, max(self.length, (length // LENGTH_STEP + 1) * LENGTH_STEP)
            for i, pair in enumerate(self.layers):
                self.layers[i] = tuple(self._grown(i, old, keep) for old in pair)  # type: ignore[assignment]
        return len(lengths)

    def _zeros(self, number: int, like: Tensor, heads: int, size: int) -> Tensor:
        window = self.model.windows.get(number)
        length = self.length if window is None else min(self.length, window + 1)  # here too, one more than in use
        zeros = like.new_zeros(self.rows, heads, length, size)
        mark_dynamic(zeros, (0, 2))
        return zeros

    def _grown(self, number: int, old: Tensor, keep: int) -> Tensor:
        new = self._zeros(number, old, old.shape[1], old.shape[3])
        new[:keep, :, : old.shape[2]] = old[:keep]
        return new

    def layer(self, number: int, key_TKD: Tensor, value_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer; the first pass through the model allocates them."""
        if number == len(self.layers):
            keys, values = (self._zeros(number, x, *x.shape[1:]) for x in (key_TKD, value_TKD))
            self.layers.append((keys, values))
        return self.layers[number]

    def attention(self, pieces: list[Piece]) -> Attend:
        return _Prefill(self, pieces)

    def run_step(self, ids: list[int], positions: list[int]) -> Tensor:
        ids_R, positions_R = (torch.tensor(x, device=self.device) for x in (ids, positions))
        attend = _Decode(self, positions_R, max(positions) + 1)
        for x in (ids_R, positions_R, attend.rows_R, *attend.biases.values(), *attend.places.values()):
            mark_dynamic(x, 0)
        for x in attend.biases.values():
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
        self.cache, self.pieces, self.first = cache, pieces, pieces[0]
        lengths = torch.tensor([piece.end - piece.start for piece in pieces], device=cache.device)
        self.packed = PackedAttention(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
        self.places: dict[int | None, tuple[Tensor, Tensor, Tensor]] = {}
        """Tokens to store, with their rows and places, by sliding window."""

    def __call__(self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scoring: Scoring) -> Tensor:
        window = scoring.window
        keys, values = self.cache.layer(layer, key_TKD, value_TKD)
        if window not in self.places:
            self.places[window] = self._places(window)
        token, row, place = self.places[window]
        if self.first.start == 0:
            out = self.packed(layer, query_THD, key_TKD, value_TKD, scoring)
        else:  # before new positions take the places of earlier ones
            key_SKD, value_SKD = (
                torch.cat([self._earlier(cached, window), new])
                for cached, new in ((keys, key_TKD), (values, value_TKD))
            )
            out = attend_to_earlier(query_THD, key_SKD, value_SKD, scoring)
        keys[row, :, place] = key_TKD[token]
        values[row, :, place] = value_TKD[token]
        return out

    def _places(self, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the packed tokens to store, each with its row and its place: the last `window` of each piece."""
        stored = []
        begin = 0
        for piece in self.pieces:
            position = torch.arange(piece.start if window is None else max(piece.start, piece.end - window), piece.end)
            token, place = position - piece.start + begin, position if window is None else position % window
            stored += [(token, torch.full_like(place, row), place) for row in piece.rows]
            begin += piece.end - piece.start
        tokens, rows, places = (torch.cat(parts).to(self.cache.device) for parts in zip(*stored, strict=True))
        return tokens, rows, places

    def _earlier(self, cached: Tensor, window: int | None) -> Tensor:
        """Return the keys or values [S, K, D] of the positions before the piece that its first token sees."""
        start, of_row = self.first.start, cached[self.first.rows[0]]
        if window is None:
            return of_row[:, :start].transpose(0, 1)
        seen = torch.arange(max(0, start - window + 1), start, device=cached.device)
        return of_row[:, seen % window].transpose(0, 1)


class _Decode:
    """Attention of one new token in each row, at `positions_R`, over the first `length` positions."""

    def __init__(self, cache: DenseCache, positions_R: Tensor, length: int) -> None:
        self.cache = cache
        self.rows_R = torch.arange(len(positions_R), device=positions_R.device)
        windows = {None, *cache.model.windows.values()}
        self.places = {window: positions_R if window is None else positions_R % window for window in windows}
        """Place of the new token in each row, by sliding window."""
        self.biases = {window: _bias(positions_R, length, window) for window in windows}
        """0 for the places that the new token sees, -inf for others, [R, 1, 1, L], by sliding window."""

    def __call__(self, layer: int, query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor, scoring: Scoring) -> Tensor:
        keys, values = self.cache.layer(layer, key_RKD, value_RKD)
        place_R, bias_R11L = self.places[scoring.window], self.biases[scoring.window]
        keys[self.rows_R, :, place_R] = key_RKD
        values[self.rows_R, :, place_R] = value_RKD
        num_rows, length = len(query_RHD), bias_R11L.shape[-1]
        keys_RKLD, values_RKLD = (x[:num_rows, :, :length] for x in (keys, values))
        if not scoring.is_plain:
            query_RH1D, bias_R111L = query_RHD[:, :, None], bias_R11L[:, None]
            return scored_attention(query_RH1D, keys_RKLD, values_RKLD, scoring, bias_R111L).flatten(1)
        # query heads that share a key/value head form the rows of one small matrix
        query_RKGD = query_RHD.reshape(num_rows, key_RKD.shape[1], -1, query_RHD.shape[2])
        bias_R11L = bias_R11L.to(query_RHD.dtype)
        out_RKGD = F.scaled_dot_product_attention(query_RKGD, keys_RKLD, values_RKLD, bias_R11L, scale=scoring.scaling)
        return out_RKGD.flatten(1)


def _bias(positions_R: Tensor, length: int, window: int | None) -> Tensor:
    """Return the bias of the scores of a token in each row, over the places of the first `length` positions."""
    positions_R111 = positions_R[:, None, None, None]
    places = torch.arange(length if window is None else min(length, window), device=positions_R.device)
    age_R11L = positions_R111 - places
    if window is not None:  # the age of a place without a position yet is more than the position of the token
        age_R11L = torch.where(age_R11L % window <= positions_R111, age_R11L % window, -1)
    return torch.where(age_R11L >= 0, 0.0, -torch.inf)
