"""What the engine asks of the memory of keys and values. On CPUs it is a `DenseCache`, on GPUs a `PagedCache`.

Running requests take rows 0, 1, 2, ... without gaps; every row has a length of its own.

Shapes: R rows, T packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from RL2.ops.attention import Attend

Step = Callable[[Tensor, Tensor, Attend], Tensor]
"""(token ids [T], positions [T], attention) -> logits [T, V]: a pass through the model."""


class Piece(NamedTuple):
    """The tokens from `start` to `end` of a prompt, and the rows that share it."""

    rows: list[int]
    start: int
    end: int


class Cache(Protocol):
    def max_rows(self, longest: int) -> int:
        """Requests that may run at once when the longest comes to so many tokens; 0 if not even that one fits."""
        ...

    def add(self, row: int, length: int, like: int | None) -> bool:
        """Take the next row for a prompt of `length` tokens, which is also that of row `like`; False: no room."""
        ...

    def reserve(self, lengths: list[int], keep: int, longest: int, rows: int) -> int:
        """Room for so many tokens in each row; the first `keep` rows hold some already.

        Returns how many rows, the first ones, have it; the others have to leave. `longest` and `rows` are what may be
        asked for later.
        """
        ...

    def prefill(self, pieces: list[Piece]) -> Attend:
        """Attention of prompts from their start, packed, or of one piece of one prompt whose earlier ones are there."""
        ...

    def decode(self, step: Step, ids: list[int], positions: list[int]) -> Tensor:
        """What `step` makes of one new token in each row, at its position: [R, V]."""
        ...

    def leave(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        """The rows `gone` are free; rows `sources`, with `length` tokens at most, take the places `targets`."""
        ...


def bytes_per_position(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """What the keys and values of one token take, over all layers."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * dtype.itemsize
