"""A KV cache in one dense tensor per layer, which matrix products read without a copy.

A layer with a sliding window of W positions keeps the last N alone: position p is at place p % N, over p - N. N is W
and, with drafts, so many more that a wrong draft overwrites nothing that the next token sees.

Shapes: R rows (one running request each), K key/value heads, H query heads, D head size, L places, T packed tokens, M
new tokens of a row, padded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import mark_dynamic

from RL2.engines.embedded.packed import KVCache, PackedForward, Piece
from RL2.engines.embedded.prefixes import BLOCK, Layers, PrefixTree
from RL2.engines.memory import bytes_per_row
from RL2.ops.attention import Attend, PackedAttention, attend_to_earlier
from RL2.ops.causal_attention import Scoring, scored_attention

LENGTH_STEP = 64
"""Granularity of allocated positions."""


class DenseCache(KVCache):
    """A `KVCache` of tensors [R, K, L, D] per layer, which grow on demand.

    Memory is zeroed: a masked position has weight 0, but 0 times a NaN in raw memory is NaN.
    """

    def __init__(
        self, model: PackedForward, budget_bytes: float, max_draft: int = 0, prefixes: PrefixTree | None = None
    ) -> None:
        """Hold rows in `budget_bytes`. Drafts have up to `max_draft` tokens; `prefixes` outlive the cache."""
        super().__init__(model)
        self.budget_bytes, self.prefixes = budget_bytes, prefixes
        self.kept = {number: window + max_draft for number, window in model.windows.items()}
        """Number of a layer -> positions that it keeps, for the layers that do not keep all."""
        self.rings = {window: window + max_draft for window in model.windows.values()}
        """The same, by sliding window."""
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.rows, self.length = 0, 0

    def max_rows(self, longest: int) -> int:
        lm, kept = self.model.lm, {number: places + 1 for number, places in self.kept.items()}
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
        kept = self.kept.get(number)
        length = self.length if kept is None else min(self.length, kept + 1)  # here too, one more than in use
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

    def restore(self, prompt: tuple[int, ...], rows: list[int]) -> int:
        blocks = self.prefixes.find(prompt) if self.prefixes else []
        for number, pairs in enumerate(zip(*blocks, strict=True)):
            keys_KBD, values_KBD = zip(*pairs, strict=True)
            key_KTD, value_KTD = torch.cat(keys_KBD, 1), torch.cat(values_KBD, 1)
            keys, values = self.layer(number, key_KTD.transpose(0, 1), value_KTD.transpose(0, 1))
            keys[rows, :, : key_KTD.shape[1]] = key_KTD
            values[rows, :, : value_KTD.shape[1]] = value_KTD
        return BLOCK * len(blocks)

    def keep(self, row: int, token_ids: list[int]) -> None:
        def read(start: int, end: int) -> Layers:
            return [
                (keys[row, :, start:end].clone(), values[row, :, start:end].clone()) for keys, values in self.layers
            ]

        if self.prefixes is not None:
            self.prefixes.add(token_ids, read)

    def place(self, position: Tensor, window: int | None) -> Tensor:
        """Return the places of positions in layers with this window."""
        return position if window is None else position % self.rings[window]

    def bias(self, position_RM: Tensor, length: int, window: int | None) -> Tensor:
        """Return 0 for the places of the first `length` positions that a token sees, -inf for others, [R, 1, M, L]."""
        position_R1M1 = position_RM[:, None, :, None]
        ring = length if window is None else self.rings[window]
        age_R1ML = position_R1M1 - torch.arange(min(length, ring), device=position_RM.device)
        is_seen_R1ML = age_R1ML >= 0
        if window is not None:  # the age of a place without a position yet is more than the position of the token
            age_R1ML = age_R1ML % ring
            is_seen_R1ML = (age_R1ML <= position_R1M1) & (age_R1ML < window)
        return torch.where(is_seen_R1ML, 0.0, -torch.inf)

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

    def has_room(self, lengths: list[int]) -> bool:
        return True  # `max_rows` counts every row at its full length

    def run_several(self, ids: list[list[int]], positions: list[int]) -> Tensor:
        attend = _Verify(self, [len(new) for new in ids], positions)
        ids_T = torch.tensor([token for new in ids for token in new], device=self.device)
        return self.model.logits(ids_T, attend.positions_T, attend)

    def leave(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        if sources:
            for pair in self.layers:
                for cached in pair:
                    cached[targets, :, :length] = cached[sources, :, :length]


class _Prefill:
    """Attention of prompts, which stores keys and values in the rows of all requests that share a prompt."""

    def __init__(self, cache: DenseCache, pieces: list[Piece]) -> None:
        self.cache, self.pieces = cache, pieces
        self.lengths = [piece.end - piece.start for piece in pieces]
        length_B = torch.tensor(self.lengths, device=cache.device)
        self.packed = PackedAttention(torch.cat([length_B.new_zeros(1), length_B.cumsum(0)]))
        self.places: dict[int | None, tuple[Tensor, Tensor, Tensor]] = {}
        """Tokens to store, with their rows and places, by sliding window."""

    def __call__(self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scoring: Scoring) -> Tensor:
        window = scoring.window
        keys, values = self.cache.layer(layer, key_TKD, value_TKD)
        if window not in self.places:
            self.places[window] = self._places(window)
        token, row, place = self.places[window]
        if all(piece.start == 0 for piece in self.pieces):
            out = self.packed(layer, query_THD, key_TKD, value_TKD, scoring)
        else:  # before new positions take the places of earlier ones
            parts = zip(self.pieces, *(x.split(self.lengths) for x in (query_THD, key_TKD, value_TKD)), strict=True)
            out = torch.cat(
                [
                    attend_to_earlier(
                        query,
                        torch.cat([self._earlier(piece, keys, window), key]),
                        torch.cat([self._earlier(piece, values, window), value]),
                        scoring,
                    )
                    for piece, query, key, value in parts
                ]
            )
        keys[row, :, place] = key_TKD[token]
        values[row, :, place] = value_TKD[token]
        return out

    def _places(self, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the packed tokens to store, each with its row and its place: the last `window` of each piece."""
        stored = []
        begin = 0
        for piece in self.pieces:
            position = torch.arange(piece.start if window is None else max(piece.start, piece.end - window), piece.end)
            token, place = position - piece.start + begin, self.cache.place(position, window)
            stored += [(token, torch.full_like(place, row), place) for row in piece.rows]
            begin += piece.end - piece.start
        tokens, rows, places = (torch.cat(parts).to(self.cache.device) for parts in zip(*stored, strict=True))
        return tokens, rows, places

    def _earlier(self, piece: Piece, cached: Tensor, window: int | None) -> Tensor:
        """Return the keys or values [S, K, D] of the positions before a piece that its first token sees."""
        start, of_row = piece.start, cached[piece.rows[0]]
        if window is None:
            return of_row[:, :start].transpose(0, 1)
        seen = torch.arange(max(0, start - window + 1), start, device=cached.device)
        return of_row[:, self.cache.place(seen, window)].transpose(0, 1)


class _Decode:
    """Attention of one new token in each row, at `positions_R`, over the first `length` positions."""

    def __init__(self, cache: DenseCache, positions_R: Tensor, length: int) -> None:
        self.cache = cache
        self.rows_R = torch.arange(len(positions_R), device=positions_R.device)
        windows = {None, *cache.model.windows.values()}
        self.places = {window: cache.place(positions_R, window) for window in windows}
        """Place of the new token in each row, by sliding window."""
        self.biases = {window: cache.bias(positions_R[:, None], length, window) for window in windows}
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


class _Verify:
    """Attention of several new tokens in each row, the first at `positions`; T in all."""

    def __init__(self, cache: DenseCache, counts: list[int], positions: list[int]) -> None:
        self.cache = cache
        count_R, begin_R = (torch.tensor(x, device=cache.device) for x in (counts, positions))
        num_rows, most = len(counts), max(counts)
        self.rows_T = torch.arange(num_rows, device=cache.device).repeat_interleave(count_R)
        first_R = count_R.cumsum(0) - count_R
        within_T = torch.arange(sum(counts), device=cache.device) - first_R[self.rows_T]
        self.positions_T = begin_R[self.rows_T] + within_T
        within_RM = torch.minimum(torch.arange(most, device=cache.device), count_R[:, None] - 1)
        self.token_RM = first_R[:, None] + within_RM
        """Token at each place of the padded rows; padding repeats the last one."""
        self.place_T = self.rows_T * most + within_T
        """Place of each token in the padded rows."""
        windows = {None, *cache.model.windows.values()}
        length = max(first + count for first, count in zip(positions, counts, strict=True))
        self.places = {window: cache.place(self.positions_T, window) for window in windows}
        self.biases = {window: cache.bias(begin_R[:, None] + within_RM, length, window) for window in windows}

    def __call__(self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scoring: Scoring) -> Tensor:
        keys, values = self.cache.layer(layer, key_TKD, value_TKD)
        place_T, bias_R1ML = self.places[scoring.window], self.biases[scoring.window]
        keys[self.rows_T, :, place_T] = key_TKD
        values[self.rows_T, :, place_T] = value_TKD
        num_rows, _, most, length = bias_R1ML.shape
        keys_RKLD, values_RKLD = (x[:num_rows, :, :length] for x in (keys, values))
        query_RMHD = query_THD[self.token_RM]
        if scoring.is_plain:
            # query heads that share a key/value head, and the new tokens, form the rows of one matrix
            query_RKND = query_RMHD.unflatten(2, (key_TKD.shape[1], -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
            groups = query_THD.shape[1] // key_TKD.shape[1]
            bias_R1NL = bias_R1ML.to(query_THD.dtype).repeat(1, 1, groups, 1)
            out_RKND = F.scaled_dot_product_attention(
                query_RKND, keys_RKLD, values_RKLD, bias_R1NL, scale=scoring.scaling
            )
            out_RHMD = out_RKND.unflatten(2, (groups, most)).flatten(1, 2)
        else:
            out_RHMD = scored_attention(query_RMHD.transpose(1, 2), keys_RKLD, values_RKLD, scoring, bias_R1ML[:, None])
        return out_RHMD.transpose(1, 2).flatten(0, 1)[self.place_T].flatten(1)
