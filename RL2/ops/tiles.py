"""Tiles of logits: their size, and products of matrices that are never accumulated in half precision.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUDGET_MIB = {"cpu": 64.0, "cuda": 512.0}
"""MiB of logits in memory at a time, by device type."""

TILE_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Rows per tile, by device type: enough for a matrix product to run at full speed."""

CPU_TILE_MIB = 8.0
"""Size of a tile on a CPU: smaller than the budget, so that repeated passes stay in the cache."""


@dataclass(frozen=True)
class VocabularyShard:
    """Shard of the head: its rows are the tokens from `start` on, out of `total`; `group` holds the rest.

    All processes of the group have the same hidden states and get the same statistics.
    """

    group: dist.ProcessGroup
    start: int
    total: int


def gathered_head(head_VD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the whole head; gradients flow into this process's own part."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, head_VD.detach(), group=group)
    parts[dist.get_rank(group)] = head_VD
    return torch.cat(parts)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 (float64 for float64), differentiable."""
    return a.to(accumulation_dtype(a)) @ b.to(accumulation_dtype(b))


def add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> None:
    """Compute out = beta * out + alpha * a @ b, accumulated in the dtype of `out`, never in half precision."""
    half = torch.float16 if torch.float16 in (a.dtype, b.dtype) else torch.bfloat16
    if out.is_cuda and half in (a.dtype, b.dtype):
        torch.addmm(out, a.to(half), b.to(half), beta=beta, alpha=alpha, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass
class GradientSums:
    """Gradients of hidden states and head, accumulated over tiles in float32 for any dtype of the model.

    The first tile sets, the others add. None where no gradient is needed.
    """

    hidden_TD: Tensor | None
    head_VD: Tensor | None
    begun: bool = False
    """True once a tile of tokens has been added to `head_VD`."""

    @classmethod
    def empty(cls, hidden_TD: Tensor, head_VD: Tensor, needed: Sequence[bool], dtype: torch.dtype) -> GradientSums:
        """Return uninitialised sums of the gradients that are `needed`: of hidden states, of head."""
        return cls(
            torch.empty_like(hidden_TD, dtype=dtype) if needed[0] else None,
            torch.empty_like(head_VD, dtype=dtype) if needed[1] else None,
        )

    def add(self, g_CW: Tensor, at: slice, columns: slice, hidden_TD: Tensor, head_VD: Tensor) -> None:
        """Add the gradient of the logits of the tokens `at` and some columns. Columns come in order for each `at`."""
        if self.hidden_TD is not None:
            add_product(self.hidden_TD[at], g_CW, head_VD[columns], beta=float(columns.start > 0))
        if self.head_VD is not None:
            add_product(self.head_VD[columns], g_CW.T, hidden_TD[at], beta=float(self.begun))

    def of_some(self, count: int) -> GradientSums:
        """Return sums for `count` of the tokens, with the same head; `merge` puts them in their places."""
        hidden_RD = None if self.hidden_TD is None else self.hidden_TD.new_empty(count, self.hidden_TD.shape[1])
        return GradientSums(hidden_RD, self.head_VD, self.begun)

    def merge(self, index_R: Tensor, some: GradientSums) -> None:
        """Add the sums of the tokens `index_R`. Without sums from before, those of all others are 0."""
        if self.hidden_TD is not None:
            assert some.hidden_TD is not None
            if not self.begun:
                self.hidden_TD.zero_()
            self.hidden_TD.index_add_(0, index_R, some.hidden_TD)
        self.begun = True


def slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
