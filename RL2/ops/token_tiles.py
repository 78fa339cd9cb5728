"""Token statistics and their gradient in tiles: nothing of size [T, V] is in memory.

Without an expectation the forward pass computes each logit once and the backward pass once more. With one
(ops/one_pass.py) the forward pass holds the logits of whole rows until it has their statistics, hence their slopes, and
takes the gradient from them.

Shapes: T tokens, V vocabulary, D hidden size, C tokens and W columns of one tile, K of the most likely tokens, R tokens
with a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from RL2.ops import tally as plain
from RL2.ops.one_pass import Expected, joined, unmet
from RL2.ops.tally import Rows, Slopes, Tally, Top
from RL2.ops.tiles import (
    BUDGET_MIB,
    CPU_TILE_MIB,
    TILE_TOKENS,
    GradientSums,
    VocabularyShard,
    accumulation_dtype,
    add_product,
    all_gather,
    slices,
)


@dataclass(frozen=True)
class Job:
    """Settings of one call of the tiled implementations."""

    names: tuple[str, ...]
    top_k: int
    factor: float
    """Factor of hidden @ head.T: the transform's scale over the temperature."""
    cap: float | None
    """Soft cap of the logits over the temperature."""
    tp: VocabularyShard | None
    triton: bool
    budget_mib: float | None

    @property
    def wants_rank(self) -> bool:
        return "rank" in self.names

    @property
    def ops(self) -> Any:
        """Module with `tally`, `gradient` and `count_above`: plain or Triton kernels."""
        if not self.triton:
            return plain
        from RL2.ops import tally_triton

        return tally_triton

    def tile_shape(
        self, num_tokens: int, vocabulary: int, device: torch.device, *, whole_rows: bool
    ) -> tuple[int, int]:
        """Return tokens and columns per tile. With `whole_rows` all columns of its tokens are within the budget.

        The tokens are equal on all processes of a tensor-parallel group, since each tile ends in collectives.
        """
        if self.tp is not None:
            vocabulary = math.ceil(self.tp.total / dist.get_world_size(self.tp.group))
        budget = int((self.budget_mib or BUDGET_MIB[device.type]) * 2**20) // 4
        size = min(budget, int(CPU_TILE_MIB * 2**20) // 4) if device.type == "cpu" else budget
        if whole_rows:
            tokens = max(1, min(num_tokens, budget // vocabulary))
            tokens = math.ceil(num_tokens / math.ceil(num_tokens / tokens)) if num_tokens else 1  # tiles of equal size
        else:
            tokens = max(1, min(num_tokens, TILE_TOKENS[device.type], size))
        return tokens, max(1, min(vocabulary, size // tokens))


class Chunked(torch.autograd.Function):
    """Tiled statistics. The backward pass computes logits only of tokens whose gradient the forward pass has not."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, job: Job, expected: Expected | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a statistic that no loss reads costs nothing in the backward pass
        ctx.expected = expected if any(ctx.needs_input_grad[:2]) else None
        sums, slopes = GradientSums(None, None), dict[str, Tensor]()
        if ctx.expected is None:
            tiles = _Tiles(hidden_TD, head_VD, job, whole_rows=job.wants_rank)
            whole = _merged([_tile_stats(tiles, at, labels_T[at], job) for at in tiles.tokens], labels_T, job)
        else:
            sums = GradientSums.empty(hidden_TD, head_VD, ctx.needs_input_grad, accumulation_dtype(hidden_TD))
            whole, slopes = _one_pass(hidden_TD, head_VD, labels_T, job, ctx.expected, sums)
        out = tuple(whole[name] for name in job.names)
        ctx.mark_non_differentiable(*(whole[name] for name in ("rank", "top_id") if name in job.names))
        kept = {name: whole[name] for name in (*Rows._fields, "top_id") if name in whole}
        ctx.job, ctx.kept, ctx.slopes = job, tuple(kept), tuple(slopes)
        # fields that are outputs are saved as such; the others are copies of size [T]
        ctx.save_for_backward(
            hidden_TD, head_VD, labels_T, sums.hidden_TD, sums.head_VD, *kept.values(), *slopes.values()
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        job: Job = ctx.job
        slopes = {name: grad for name, grad in zip(job.names, grads, strict=True) if grad is not None}
        hidden_TD, head_VD, labels_T, *taken = ctx.saved_tensors[:5]
        saved = dict(zip(ctx.kept, ctx.saved_tensors[5:], strict=False))
        row = Rows(*(saved[name] for name in Rows._fields))
        slope = plain.slopes(row, labels_T, saved.get("top_id"), slopes, job.factor)
        sums = None
        if ctx.expected is not None:
            rest = unmet(slopes, dict(zip(ctx.slopes, ctx.saved_tensors[5 + len(ctx.kept) :], strict=True)))
            correction = plain.slopes(row, labels_T, saved.get("top_id"), rest, job.factor)
            missed = int(plain.with_gradient(correction).sum())
            ctx.expected.missed += missed
            if 2 * missed <= len(labels_T):  # else it is cheaper, and more precise, to begin again
                slope, sums = correction, GradientSums(taken[0], taken[1], begun=True)
        index_R = plain.with_gradient(slope).nonzero()[:, 0]
        if sums is None or len(index_R):
            sums = sums or GradientSums.empty(hidden_TD, head_VD, ctx.needs_input_grad, accumulation_dtype(hidden_TD))
            _add_gradient_again(index_R, slope, hidden_TD, head_VD, job, sums)
        if sums.hidden_TD is not None and job.tp is not None:
            dist.all_reduce(sums.hidden_TD, group=job.tp.group)
        grads_of = (sums.hidden_TD, hidden_TD), (sums.head_VD, head_VD)
        return *(None if grad is None else grad.to(x.dtype) for grad, x in grads_of), None, None, None


def _add_gradient(sums: GradientSums, tiles: _Tiles, at: slice, slope: Slopes, job: Job, *, fill: bool) -> None:
    """Add the gradient of the tokens `at`, whose logits are in memory unless they are to be computed (`fill`)."""
    for columns, z_CW, scratch_CW, start in tiles.chunks(at, fill=fill):
        bend_CW = None if job.cap is None else 1 - (z_CW / job.cap).square_()  # the derivative of the soft cap
        g_CW = job.ops.gradient(z_CW, start, scratch_CW, slope, tiles.grad_dtype)
        if bend_CW is not None:
            g_CW.mul_(bend_CW)
        sums.add(g_CW, at, columns, tiles.hidden_TD, tiles.head_VD)
    sums.begun = True


def _one_pass(
    hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, job: Job, expected: Expected, sums: GradientSums
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the statistics of all tokens and the slopes that are expected, and add the gradient to `sums`."""
    tiles = _Tiles(hidden_TD, head_VD, job, whole_rows=True, keeps=True)
    found: list[dict[str, Tensor]] = []
    slopes: list[dict[str, Tensor]] = []
    for at in tiles.tokens:
        here = _merged([_tile_stats(tiles, at, labels_T[at], job)], labels_T[at], job)
        index_C = torch.arange(at.start, at.stop, device=labels_T.device)
        wanted = expected.slopes({name: here[name] for name in job.names}, index_C)
        row = Rows(*(here[name] for name in Rows._fields))
        slope = plain.slopes(row, labels_T[at], here.get("top_id"), wanted, job.factor)
        _add_gradient(sums, tiles, at, slope, job, fill=False)
        found.append(here)
        slopes.append(wanted)
    return joined(found), joined(slopes, found)


def _add_gradient_again(
    index_R: Tensor, slope: Slopes, hidden_TD: Tensor, head_VD: Tensor, job: Job, sums: GradientSums
) -> None:
    """Add the gradient of the tokens `index_R`, from logits that are computed again."""
    some = sums
    if len(index_R) < len(hidden_TD) or sums.begun:
        slope, hidden_TD, some = slope.at(index_R), hidden_TD[index_R], sums.of_some(len(index_R))
    tiles = _Tiles(hidden_TD, head_VD, job)
    for at in tiles.tokens:
        _add_gradient(some, tiles, at, slope.at(at), job, fill=True)
    if some is not sums:
        sums.merge(index_R, some)


class _Tiles:
    """Tiles of transform(hidden @ head.T) / temperature, in buffers that all tiles share.

    With `whole_rows` the logits of all columns are in memory for the tokens of a tile, else those of a chunk of
    columns. With `keeps` the statistics leave them as they are, for the gradient.
    """

    def __init__(
        self, hidden_TD: Tensor, head_VD: Tensor, job: Job, *, whole_rows: bool = False, keeps: bool = False
    ) -> None:
        self.hidden_TD, self.head_VD, self.factor, self.cap = hidden_TD, head_VD, job.factor, job.cap
        self.whole_rows = whole_rows
        self.first = 0 if job.tp is None else job.tp.start
        rows, device = len(head_VD), hidden_TD.device
        self.num_tokens, self.width = job.tile_shape(len(hidden_TD), rows, device, whole_rows=whole_rows)
        size, dtype = self.num_tokens * min(self.width, rows), accumulation_dtype(hidden_TD)
        self.buffer = hidden_TD.new_empty(self.num_tokens * rows if whole_rows else size, dtype=dtype)
        self.grad_dtype = hidden_TD.dtype if hidden_TD.is_cuda else dtype
        """Dtype of the gradient that enters matrix products: on a GPU that of the model, for speed."""
        # the kernels need scratch only for a gradient of another dtype, and leave the logits as they are
        needs_scratch = not job.triton or self.grad_dtype != dtype
        self.scratch = self.buffer.new_empty(size, dtype=self.grad_dtype) if needs_scratch else None
        self.copy = self.buffer.new_empty(size) if keeps and not job.triton else None

    @property
    def tokens(self) -> list[slice]:
        """Slices of tokens; at least one, so that an empty batch has statistics of size 0."""
        return slices(len(self.hidden_TD), self.num_tokens) or [slice(0, 0)]

    def chunks(self, at: slice, *, fill: bool = True) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
        """Yield for the tokens `at`: a chunk's columns, its logits, scratch of the same size, and its first token id.

        Logits of whole rows that are in memory are not computed again unless `fill` is true.
        """
        hidden_CD = self.hidden_TD[at]
        for columns in slices(len(self.head_VD), self.width):
            shape = len(hidden_CD), columns.stop - columns.start
            begin = shape[0] * columns.start if self.whole_rows else 0
            z_CW = _view(self.buffer[begin:], shape)
            if fill:
                add_product(z_CW, hidden_CD, self.head_VD[columns].T, beta=0.0, alpha=self.factor)
                if self.cap is not None:
                    z_CW.div_(self.cap).tanh_().mul_(self.cap)
            scratch_CW = z_CW if self.scratch is None else _view(self.scratch, shape)
            yield columns, z_CW, scratch_CW, self.first + columns.start

    def expendable(self, z_CW: Tensor) -> Tensor:
        """Return the logits, or a copy if they are needed again, to a function that overwrites them."""
        return z_CW if self.copy is None else _view(self.copy, z_CW.shape).copy_(z_CW)


def _view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


Part = tuple[Tally, Tensor, Tensor, Top]
"""Tally of a tile, the labels' logits, the number of tokens before the label, and the K best."""


def _tile_stats(tiles: _Tiles, at: slice, labels_C: Tensor, job: Job) -> Part:
    """Return the part of the tokens `at` from this process's columns."""
    label_logit_C = tiles.buffer.new_zeros(len(labels_C))
    before_C = torch.zeros_like(labels_C)
    tallies: list[Tally] = []
    tops: list[Top] = []
    chunks: Iterable[tuple[slice, Tensor, Tensor, int]] = tiles.chunks(at)
    if job.wants_rank:  # the label's logit is needed first
        chunks = list(chunks)
        label_logit_C = _label_logit(chunks, label_logit_C, labels_C)
        if job.tp is not None:
            dist.all_reduce(label_logit_C, group=job.tp.group)
    for chunk in chunks:
        _, z_CW, scratch_CW, start = chunk
        if job.wants_rank:
            before_C += job.ops.count_above(z_CW, start, labels_C, label_logit_C)
        else:
            label_logit_C = _label_logit([chunk], label_logit_C, labels_C)
        if job.top_k:
            tops.append(plain.top(z_CW, start, job.top_k))
        sums = {"with_z": "entropy" in job.names, "with_sq": "sum_p2" in job.names}
        tallies.append(job.ops.tally(tiles.expendable(z_CW), start, scratch_CW, **sums))
    best = label_logit_C, labels_C  # unused
    if tops:
        values, ids = (torch.cat(parts, -1) for parts in zip(*tops, strict=True))
        best = plain.ordered(values, ids, job.top_k)
    return reduce(plain.merge, tallies), label_logit_C, before_C, best


def _label_logit(
    chunks: Iterable[tuple[slice, Tensor, Tensor, int]], label_logit_C: Tensor, labels_C: Tensor
) -> Tensor:
    """Return the labels' logits: those found so far, and those in `chunks`."""
    return label_logit_C + sum(plain.pick(z_CW, labels_C - start) for _, z_CW, _, start in chunks)


def _merged(parts: list[Part], labels_T: Tensor, job: Job) -> dict[str, Tensor]:
    """Return the statistics of the tokens of `parts` by name: all of `Rows`, and the other fields of the job."""
    label_logit_T, before_T = (torch.cat([part[i] for part in parts]) for i in (1, 2))  # type: ignore[misc]
    whole = Tally(*(torch.cat(sums) for sums in zip(*(part[0] for part in parts), strict=True)))
    if job.tp is not None:
        whole = reduce(plain.merge, [Tally(*part) for part in all_gather(torch.stack(whole), job.tp.group)])
        dist.all_reduce(before_T if job.wants_rank else label_logit_T, group=job.tp.group)
    row = plain.rows(whole, label_logit_T, labels_T)
    found = row._asdict()
    if job.wants_rank:
        found["rank"] = (before_T + 1).to(row.logp.dtype)
    if job.top_k:
        values, ids = (torch.cat([part[3][i] for part in parts]) for i in (0, 1))
        value_TK, found["top_id"] = _top_over_processes(values, ids, job)
        found["top_logp"] = (value_TK - whole.top[:, None]) + row.max_logp[:, None]
    return found


def _top_over_processes(value_TK: Tensor, id_TK: Tensor, job: Job) -> Top:
    """Return the K best over all processes."""
    if job.tp is not None:
        short = job.top_k - value_TK.shape[1]  # for a shard with fewer than K tokens
        padded = F.pad(value_TK, (0, short), value=-torch.inf), F.pad(id_TK, (0, short), value=job.tp.total)
        value_TK, id_TK = (torch.cat(all_gather(x.contiguous(), job.tp.group), -1) for x in padded)
        value_TK, id_TK = plain.ordered(value_TK, id_TK, min(job.top_k, job.tp.total))
    if value_TK.shape[1] < job.top_k:
        raise ValueError(f"top_k={job.top_k} must be at most the vocabulary, {value_TK.shape[1]} tokens")
    return value_TK, id_TK
