"""The protocol between the engine and what runs the model for it.

A model with packed attention has a `DenseCache` on CPUs, a `PagedCache` on GPUs; any other has a `LockstepCache`.
Running requests occupy rows 0, 1, 2, ... without gaps; each row has its own length.

Shapes: R rows, P prompts, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

PREFILL_TOKENS, CPU_PASS_TOKENS = 8192, 1024
"""Most prompt tokens admitted between two steps, and per forward pass on a CPU."""

Owners = dict[tuple[int, ...], list[int]]
"""Rows by their prompt."""


class Cache(Protocol):
    """Results of the model for the running requests, and the passes that compute more."""

    experts: dict[int, Tensor]
    """int16 [tokens, L, K]: experts of the tokens that the last prefill or decoding ran, by row, if recorded."""

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

    def prefill(self, owners: Owners) -> Tensor:
        """Run each prompt once for all rows that share it; return the logits after each prompt, [P, V]."""
        ...

    def decode(self, ids: list[int], positions: list[int]) -> Tensor:
        """Run one new token per row, at its position; return the logits [R, V]."""
        ...

    def leave(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        """Free the rows `gone`, then move rows `sources`, of at most `length` tokens, to rows `targets`."""
        ...


def pass_tokens(device: torch.device) -> int:
    """Return how many tokens a forward pass takes: few on a CPU, so that activations stay in its cache."""
    return CPU_PASS_TOKENS if device.type == "cpu" else PREFILL_TOKENS
