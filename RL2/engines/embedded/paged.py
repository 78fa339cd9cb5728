"""A paged KV cache, with decoding by CUDA graphs.

Rows that share a prompt share its pages, so a group stores its prompt once. Rows find their pages through a table, so
they move without a copy. All memory is allocated at once, because CUDA graphs need fixed addresses.

Shapes: R rows, K key/value heads, D head size, S places in all pages, P pages of a row, T packed tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from RL2.engines.embedded.graphs import Graphs
from RL2.engines.embedded.packed import KVCache, PackedForward, Piece
from RL2.ops import paged_attention as pages
from RL2.ops.attention import Attend, PackedAttention, attend_to_earlier
from RL2.ops.causal_attention import Scoring
from RL2.parallel.experts import find_experts


class PagedCache(KVCache):
    """A `KVCache` of tensors [S, K, D] per layer. Padding rows of a graph write to page 0, which no request has."""

    def __init__(
        self,
        model: PackedForward,
        budget_bytes: float,
        bytes_per_position: int,
        *,
        max_rows: int,
        longest: int,
        max_length: int,
    ) -> None:
        """Allocate memory for `max_rows` requests of `longest` tokens, or what the budget allows.

        No request has more than `max_length` tokens.
        """
        super().__init__(model)
        affordable = int(budget_bytes // (bytes_per_position * pages.PAGE))
        self.num_pages = min(affordable, max_rows * pages_of(longest) + 1)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.free = list(range(self.num_pages - 1, 0, -1))
        self.users = [0] * self.num_pages
        """Number of rows that use each page."""
        self.pages: list[list[int]] = []
        """Pages of each row."""
        self.table_RP = np.zeros((max_rows, min(pages_of(max_length), max(1, self.num_pages))), dtype=np.int32)
        """The same as an array for decoding; entries beyond a row's last page are undefined."""
        # experts choose kernels by their numbers of tokens, which a graph would fix
        self.graphs = Graphs() if self.device.type == "cuda" and not find_experts(model.lm) else None

    def max_rows(self, longest: int) -> int:
        return self.num_pages - 1 if pages_of(longest) < self.num_pages else 0

    def add(self, row: int, length: int, like: int | None) -> bool:
        assert row == len(self.pages)
        # the last page, which is not full, is not shared
        shared = [] if like is None else self.pages[like][: length // pages.PAGE]
        new = pages_of(length) - len(shared)
        if len(self.free) < new + row:  # keep one page for each running request
            return False
        for page in shared:
            self.users[page] += 1
        self.pages.append(shared + [self._take() for _ in range(new)])
        self._note(row)
        return True

    def reserve(self, lengths: list[int], keep: int, longest: int, rows: int) -> int:
        count = len(lengths)
        for row, length in enumerate(lengths):
            while row < count and len(self.pages[row]) < pages_of(length):
                if self.free:
                    self.table_RP[row, len(self.pages[row])] = page = self._take()
                    self.pages[row].append(page)
                else:  # the last request, which has run for the shortest time, gives up its pages
                    count -= 1
                    self._give_back(self.pages[count])
                    self.pages[count] = []
        return count

    def leave(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        for row in gone:
            self._give_back(self.pages[row])
        for source, target in zip(sources, targets, strict=True):
            self.pages[target] = self.pages[source]
            self._note(target)
        del self.pages[len(self.pages) - len(gone) :]

    def _note(self, row: int) -> None:
        self.table_RP[row, : len(self.pages[row])] = self.pages[row]

    def _take(self) -> int:
        page = self.free.pop()
        self.users[page] = 1
        return page

    def _give_back(self, of_row: list[int]) -> None:
        for page in of_row:
            self.users[page] -= 1
            if not self.users[page]:
                self.free.append(page)

    def layer(self, number: int, key_TKD: Tensor, value_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer; the first pass through the model allocates them."""
        if number == len(self.layers):
            keys, values = (x.new_empty(self.num_pages * pages.PAGE, *x.shape[1:]) for x in (key_TKD, value_TKD))
            self.layers.append((keys, values))
        return self.layers[number]

    def places(self, row: int, start: int, end: int) -> np.ndarray:
        """Return the places, int64 below S, of the positions `start` to `end` of a row."""
        position = np.arange(start, end)
        page = self.table_RP[row, position // pages.PAGE].astype(np.int64)
        return page * pages.PAGE + position % pages.PAGE

    def attention(self, pieces: list[Piece]) -> Attend:
        return _Prefill(self, pieces)

    def has_room(self, lengths: list[int]) -> bool:
        new = sum(max(0, pages_of(length) - len(self.pages[row])) for row, length in enumerate(lengths))
        return len(self.free) >= new + len(lengths)  # keep one page for each running request

    def run_step(self, ids: list[int], positions: list[int]) -> Tensor:
        return self._run_tokens(ids, positions, np.arange(len(ids)))

    def run_several(self, ids: list[list[int]], positions: list[int]) -> Tensor:
        """Run several new tokens of each row. Attention treats each as a row of its own that shares the pages."""
        counts = [len(new) for new in ids]
        places = [first + i for first, count in zip(positions, counts, strict=True) for i in range(count)]
        flat = [token for new in ids for token in new]
        return self._run_tokens(flat, places, np.repeat(np.arange(len(ids)), counts))

    def _run_tokens(self, ids: list[int], positions: list[int], rows: np.ndarray) -> Tensor:
        """Run tokens at `positions` of the rows; return the logits after each."""
        count = len(ids)
        parts = -(-(max(positions) + 1) // (pages.PAGE * pages.PART_PAGES))
        num_rows, num_pages = rounded(count), rounded(parts) * pages.PART_PAGES
        inputs = np.zeros((num_rows, 2 + num_pages), dtype=np.int32)
        inputs[:count, 0], inputs[:count, 1] = ids, positions
        inputs[:count, 2 : 2 + self.table_RP.shape[1]] = self.table_RP[rows, :num_pages]

        def run(inputs_RI: Tensor) -> Tensor:
            ids_R, positions_R, table_RP = inputs_RI[:, 0], inputs_RI[:, 1], inputs_RI[:, 2:]
            return self.model.step(ids_R, positions_R, _Decode(self, positions_R, table_RP))

        logits_RV = self.graphs(run, inputs, self.device) if self.graphs else run(torch.from_numpy(inputs))
        return logits_RV[:count]


class _Prefill:
    """Attention of prompts, which stores keys and values in the pages of all rows that share a prompt, each once."""

    def __init__(self, cache: PagedCache, pieces: list[Piece]) -> None:
        self.cache, self.first = cache, pieces[0]
        lengths = [piece.end - piece.start for piece in pieces]
        begins = np.cumsum([0, *lengths])
        self.packed = PackedAttention(torch.from_numpy(begins).to(cache.device))
        sources, places = [], []
        for piece, begin in zip(pieces, begins, strict=False):
            # all rows share the full pages of the first row
            last_page = max(piece.start, piece.end // pages.PAGE * pages.PAGE)
            for row in piece.rows:
                start = piece.start if row == piece.rows[0] else last_page
                sources.append(np.arange(begin + start - piece.start, begin + piece.end - piece.start))
                places.append(cache.places(row, start, piece.end))
        self.source, self.place = (torch.from_numpy(np.concatenate(x)).to(cache.device) for x in (sources, places))
        self.earlier = self.place
        if self.first.start:
            self.earlier = torch.from_numpy(cache.places(self.first.rows[0], 0, self.first.end)).to(cache.device)

    def __call__(self, layer: int, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scoring: Scoring) -> Tensor:
        keys, values = self.cache.layer(layer, key_TKD, value_TKD)
        keys[self.place] = key_TKD[self.source]
        values[self.place] = value_TKD[self.source]
        if self.first.start == 0:
            return self.packed(layer, query_THD, key_TKD, value_TKD, scoring)
        return attend_to_earlier(query_THD, keys[self.earlier], values[self.earlier], scoring)


class _Decode:
    """Attention of one new token in each row, at `positions_R`."""

    def __init__(self, cache: PagedCache, positions_R: Tensor, table_RP: Tensor) -> None:
        self.cache, self.positions_R, self.table_RP = cache, positions_R, table_RP
        page_R = table_RP.gather(1, (positions_R // pages.PAGE).long()[:, None])[:, 0]
        self.place_R = page_R.long() * pages.PAGE + positions_R % pages.PAGE

    def __call__(self, layer: int, query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor, scoring: Scoring) -> Tensor:
        keys, values = self.cache.layer(layer, key_RKD, value_RKD)
        keys.index_copy_(0, self.place_R, key_RKD)
        values.index_copy_(0, self.place_R, value_RKD)
        out_RHD = pages.attend(query_RHD, keys, values, self.table_RP, self.positions_R, scoring)
        return out_RHD.flatten(1)


def pages_of(length: int) -> int:
    """Return the number of pages of `length` tokens."""
    return -(-length // pages.PAGE)


def rounded(number: int) -> int:
    """Round up to a power of two, or to a multiple of 64: few sizes make few graphs."""
    return 1 << (number - 1).bit_length() if number <= 64 else -(-number // 64) * 64
