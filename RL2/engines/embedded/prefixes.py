"""Keys and values of earlier sequences, as a prefix tree, so that a later turn runs only its new tokens.

A node of the tree is a block of tokens behind the blocks before it. Sequences that begin alike share nodes. The blocks
that were used least recently are freed first, and a block is freed after those behind it.

Shapes: K key/value heads, B tokens of a block, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

BLOCK = 32
"""Tokens of a block."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values [K, B, D] of each layer."""
Key = tuple[int, tuple[int, ...]]
"""Number of the node before a block, and the tokens of the block."""

ROOT = 0


@dataclass
class _Node:
    number: int
    layers: Layers
    num_bytes: int


class PrefixTree:
    """Blocks of keys and values, by the tokens from the start of a sequence on."""

    def __init__(self) -> None:
        self.nodes: OrderedDict[Key, _Node] = OrderedDict()
        """Blocks, the least recently used first."""
        self.last_number = ROOT
        self.num_bytes = 0
        self.limit_bytes = 0.0
        """Memory that blocks may take."""
        self.reused = 0
        """Number of positions found since the last call of `metrics`."""

    def find(self, token_ids: tuple[int, ...]) -> list[Layers]:
        """Return the blocks that `token_ids` begin with, but not the last token: its logits are not stored."""
        path = self._path(token_ids[:-1])
        self._touch(path)
        self.reused += BLOCK * len(path)
        return [self.nodes[key].layers for key in path]

    def add(self, token_ids: list[int], read: Callable[[int, int], Layers]) -> None:
        """Store the blocks of a sequence that are not there yet; `read(start, end)` copies keys and values."""
        path = self._path(tuple(token_ids))
        for start in range(BLOCK * len(path), len(token_ids) - BLOCK + 1, BLOCK):
            layers = read(start, start + BLOCK)
            before = self.nodes[path[-1]].number if path else ROOT
            key = before, tuple(token_ids[start : start + BLOCK])
            self.last_number += 1
            num_bytes = sum(x.nbytes for pair in layers for x in pair)
            self.nodes[key] = _Node(self.last_number, layers, num_bytes)
            self.num_bytes += num_bytes
            path.append(key)
        self._touch(path)
        while self.num_bytes > self.limit_bytes:
            _, freed = self.nodes.popitem(last=False)
            self.num_bytes -= freed.num_bytes

    def clear(self) -> None:
        """Forget all; for other weights."""
        self.nodes.clear()
        self.num_bytes = 0

    def metrics(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        reused, self.reused = self.reused, 0
        return {"engine/reused_positions": float(reused)}

    def _path(self, token_ids: tuple[int, ...]) -> list[Key]:
        path: list[Key] = []
        number = ROOT
        for start in range(0, len(token_ids) - BLOCK + 1, BLOCK):
            key = number, token_ids[start : start + BLOCK]
            if key not in self.nodes:
                break
            path.append(key)
            number = self.nodes[key].number
        return path

    def _touch(self, path: list[Key]) -> None:
        """Note the use of blocks, so that each counts as used after those behind it."""
        for key in reversed(path):
            self.nodes.move_to_end(key)
