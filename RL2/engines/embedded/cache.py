"""The protocol of the KV cache: a `DenseCache` on CPUs, a `PagedCache` on GPUs.

Running requests occupy rows 0, 1, 2, ... without gaps; each row has its own length.

Shapes: R rows, T packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from RL2.ops.attention import Attend

Step = Callable[[Tensor, Tensor, Attend], Tensor]
"""(token ids [T], positions [T], attention) -> logits [T, V]: a pass through the model."""


class Piece(NamedTuple):
    """Tokens `start` to `end` of a prompt, and the rows that share the prompt."""

    rows: list[int]
    start: int
    end: int


class Cache(Protocol):
    """Keys and values of the running requests."""

    def max_rows(self, longest: int) -> int:
        """Return how many requests may run at once if the longest has `longest` tokens; 0 if it does not fit."""
        ...

    def add(self, row: int, length: int, like: int | None) -> bool:
        """Take the next row for a prompt of `length` tokens, shared with row `like`; return whether there is room."""
        ...

    def reserve(self, lengths: list[int], keep: int, longest: int, rows: int) -> int:
        """Make room for `lengths` tokens in the rows; the first `keep` rows hold tokens already.

        Returns how many rows, from the first, have room; the others have to leave. `longest` and `rows` are the most
        that later calls may ask for.
        """
        ...

    def prefill(self, pieces: list[Piece]) -> Attend:
        """Return the attention of packed prompts from their start, or of one later piece of one prompt."""
        ...

    def decode(self, step: Step, ids: list[int], positions: list[int]) -> Tensor:
        """Run `step` on one new token per row, at its position; return the logits [R, V]."""
        ...

    def leave(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        """Free the rows `gone`, then move rows `sources`, of at most `length` tokens, to rows `targets`."""
        ...
