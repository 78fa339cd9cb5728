"""Tiles of logits: their size, and products of matrices that are never accumulated in half precision.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

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


def slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
