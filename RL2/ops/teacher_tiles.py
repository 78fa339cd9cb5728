"""Statistics that compare a student with a teacher, in tiles: neither one's logits are ever in memory as a whole.

ops/divergence.py holds the mathematics. Shapes: T tokens, V vocabulary, D hidden size of the student, E of the teacher,
C tokens and W columns of one tile, K of the teacher's most likely tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from RL2.ops import divergence
from RL2.ops import tally as plain
from RL2.ops.divergence import OTHER, Side
from RL2.ops.one_pass import Complete, Expected, joined, unmet, with_slope
from RL2.ops.tally import Tally
from RL2.ops.tiles import (
    TILE_TOKENS,
    GradientSums,
    VocabularyShard,
    accumulation_dtype,
    add_product,
    all_gather,
    slices,
)

TILED = (
    "kl_teacher_student",
    "kl_student_teacher",
    "jsd",
    "student_top_logp",
    "student_tail_logp",
    "teacher_tail_logp",
)
"""Statistics that read both distributions, or the teacher's top K, in tiles; all others are made of these."""

TAILS = ("student_tail_logp", "teacher_tail_logp")
"""Statistics whose parts are added as logarithms."""

BUDGET_MIB = {"cpu": 160.0, "cuda": 512.0}
"""MiB of logits of both sides in memory at a time, by device type.

On a CPU these are 138 tokens of a vocabulary of 151,936: matrix products of fewer than 128 rows are slower.
"""

CPU_TILE_MIB = 2.0
"""Size of a tile on a CPU: all `WORKING_TILES` stay in the cache."""

WORKING_TILES = 6
"""Tiles in memory at a time: the logits of both sides, and what is computed from them."""


@dataclass(frozen=True)
class TiledJob:
    """Settings of one call of the tiled implementation."""

    names: tuple[str, ...]
    beta: float
    scales: dict[Side, tuple[float, float | None]]
    """Factor of hidden @ head.T, and soft cap, of each side."""
    tp: VocabularyShard | None
    budget_mib: float | None

    @property
    def first(self) -> int:
        """Token id of the first row of the heads."""
        return 0 if self.tp is None else self.tp.start

    @property
    def read(self) -> frozenset[str]:
        """Fields that need both distributions at once."""
        return frozenset(self.names) & {"kl_teacher_student", "kl_student_teacher", "jsd"}

    def tile(self, num_tokens: int, rows: int, device: torch.device, *, whole_rows: bool) -> tuple[int, int]:
        """Return tokens and columns per tile.

        With `whole_rows` the logits of both sides are in memory for all columns at these tokens. The tokens are then
        equal on all processes of a tensor-parallel group, since each such tile ends in collectives.
        """
        budget = int((self.budget_mib or BUDGET_MIB[device.type]) * 2**20) // 4
        size = budget // WORKING_TILES
        if device.type == "cpu":
            size = min(size, int(CPU_TILE_MIB * 2**20) // 4)
        tokens = TILE_TOKENS[device.type]
        if whole_rows:
            width = rows if self.tp is None else math.ceil(self.tp.total / dist.get_world_size(self.tp.group))
            tokens = budget // (2 * width)
        tokens = max(1, min(tokens, num_tokens, size))
        return tokens, max(1, min(rows, size // tokens))


class _Logits:
    """Tiles of transform(hidden @ head.T) / temperature of one side."""

    def __init__(self, hidden_TD: Tensor, head_VD: Tensor, scale: tuple[float, float | None]) -> None:
        self.hidden_TD, self.head_VD = hidden_TD, head_VD
        self.factor, self.cap = scale

    def fill(self, z_CW: Tensor, at: slice, columns: slice) -> Tensor:
        """Fill a tile with the logits of the tokens `at` and some columns, and return it."""
        add_product(z_CW, self.hidden_TD[at], self.head_VD[columns].T, beta=0.0, alpha=self.factor)
        return z_CW if self.cap is None else z_CW.div_(self.cap).tanh_().mul_(self.cap)

    def bend(self, z_CW: Tensor) -> Tensor:
        """Return the derivative of the soft cap at capped logits."""
        assert self.cap is not None
        return 1 - (z_CW / self.cap).square_()


class Tiled(torch.autograd.Function):
    """Statistics of two distributions. Nothing of size [T, V] is kept.

    The forward pass computes each logit once. So does the backward pass for tokens whose gradient the forward pass has
    not taken from an expected loss (ops/one_pass.py).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        head_VD: Tensor,
        hidden_TE: Tensor,
        head_VE: Tensor,
        top_id_TK: Any,
        job: TiledJob,
        expected: Expected | None = None,
        complete: Complete | None = None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a statistic that no loss reads costs nothing in the backward pass
        inputs = hidden_TD, head_VD, hidden_TE, head_VE
        sides = _logits(inputs, job)
        ctx.expected = expected if any(ctx.needs_input_grad[:4]) else None
        ctx.dtype = torch.promote_types(accumulation_dtype(hidden_TD), accumulation_dtype(hidden_TE))
        sums = {} if ctx.expected is None else _empty_sums(inputs, ctx.needs_input_grad, ctx.dtype)
        num_tokens, width = job.tile(len(hidden_TD), len(head_VD), hidden_TD.device, whole_rows=True)
        buffers = {side: hidden_TD.new_empty(num_tokens * len(head_VD), dtype=ctx.dtype) for side in sides}
        scratch = hidden_TD.new_empty(num_tokens * width, dtype=ctx.dtype)
        chunks = slices(len(head_VD), width)
        parts, slopes = list[dict[str, Tensor]](), list[dict[str, Tensor]]()
        for at in slices(len(hidden_TD), num_tokens) or [slice(0, 0)]:
            here, tiles = _row_sums(sides, at, chunks, buffers, scratch, top_id_TK, job)
            parts.append(here)
            if ctx.expected is not None:
                assert complete is not None
                index_C = torch.arange(at.start, at.stop, device=hidden_TD.device)
                slopes.append(ctx.expected.slopes({name: here[name] for name in job.names}, index_C, complete))
                of_side = _slopes(sums, here, slopes[-1], job)
                for i, columns in enumerate(chunks):
                    log_CW = {side: tiles[side][i] for side in sides}
                    _add_gradient(sums, sides, of_side, log_CW, here, top_id_TK, job, at, columns)
                for of_both in sums.values():
                    of_both.begun = True
        saved, expectation = joined(parts), joined(slopes, parts) if slopes else {}
        ctx.job, ctx.kept, ctx.slopes = job, tuple(saved), tuple(expectation)
        taken = [None] * 4 if not sums else [x for one in sums.values() for x in (one.hidden_TD, one.head_VD)]
        ctx.save_for_backward(*inputs, top_id_TK, *taken, *saved.values(), *expectation.values())
        return tuple(saved[name] for name in job.names)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        job: TiledJob = ctx.job
        slopes = {name: grad for name, grad in zip(job.names, grads, strict=True) if grad is not None}
        inputs, top_id_TK, taken = ctx.saved_tensors[:4], ctx.saved_tensors[4], ctx.saved_tensors[5:9]
        saved = dict(zip(ctx.kept, ctx.saved_tensors[9:], strict=False))
        sums: Sums | None = None
        if ctx.expected is not None:
            rest = unmet(slopes, dict(zip(ctx.slopes, ctx.saved_tensors[9 + len(ctx.kept) :], strict=True)))
            missed = int(with_slope(rest, inputs[0]).sum())
            ctx.expected.missed += missed
            if 2 * missed <= len(inputs[0]):  # else it is cheaper, and more precise, to begin again
                slopes = rest
                sums = {
                    "student": GradientSums(taken[0], taken[1], begun=True),
                    "teacher": GradientSums(taken[2], taken[3], begun=True),
                }
        index_R = with_slope(slopes, inputs[0]).nonzero()[:, 0]
        if sums is None or len(index_R):
            sums = sums or _empty_sums(inputs, ctx.needs_input_grad, ctx.dtype)
            _add_gradient_again(index_R, inputs, top_id_TK, saved, slopes, job, sums)
        found = [x for one in sums.values() for x in (one.hidden_TD, one.head_VD)]
        if job.tp is not None:
            for grad_hidden in (found[0], found[2]):
                if grad_hidden is not None:
                    dist.all_reduce(grad_hidden, group=job.tp.group)
        given = (None if x is None else x.to(y.dtype) for x, y in zip(found, inputs, strict=True))
        return *given, None, None, None, None


Sums = dict[Side, GradientSums]


def _empty_sums(inputs: Sequence[Tensor], needed: Sequence[bool], dtype: torch.dtype) -> Sums:
    return {
        "student": GradientSums.empty(inputs[0], inputs[1], needed[:2], dtype),
        "teacher": GradientSums.empty(inputs[2], inputs[3], needed[2:4], dtype),
    }


def _slopes(
    sums: Sums, here: dict[str, Tensor], slopes: dict[str, Tensor], job: TiledJob
) -> dict[Side, divergence.Slopes]:
    """Return the slopes of the logits of each side that trains."""
    return {
        side: divergence.slopes(side, here, slopes, job.beta, job.scales[side][0])
        for side, one in sums.items()
        if not (one.hidden_TD is None and one.head_VD is None)
    }


def _add_gradient_again(
    index_R: Tensor,
    inputs: Sequence[Tensor],
    top_id_TK: Tensor | None,
    saved: dict[str, Tensor],
    slopes: dict[str, Tensor],
    job: TiledJob,
    sums: Sums,
) -> None:
    """Add the gradient of the tokens `index_R` to `sums`, from logits that are computed again."""
    hidden_TD, head_VD, hidden_TE, head_VE = inputs
    some = sums
    if len(index_R) < len(hidden_TD) or any(one.begun for one in sums.values()):
        hidden_TD, hidden_TE = hidden_TD[index_R], hidden_TE[index_R]
        top_id_TK = None if top_id_TK is None else top_id_TK[index_R]
        saved, slopes = ({name: x[index_R] for name, x in values.items()} for values in (saved, slopes))
        some = {side: one.of_some(len(index_R)) for side, one in sums.items()}
    sides = _logits((hidden_TD, head_VD, hidden_TE, head_VE), job)
    num_tokens, width = job.tile(len(hidden_TD), len(head_VD), hidden_TD.device, whole_rows=False)
    dtype = torch.promote_types(accumulation_dtype(hidden_TD), accumulation_dtype(hidden_TE))
    buffers = {side: hidden_TD.new_empty(num_tokens * width, dtype=dtype) for side in sides}
    for at in slices(len(hidden_TD), num_tokens) or [slice(0, 0)]:
        here = {name: x[at] for name, x in saved.items()}
        of_side = _slopes(some, here, {name: x[at] for name, x in slopes.items()}, job)
        for columns in slices(len(head_VD), width):
            log_CW = {
                side: _normalise(logits.fill(_view(buffers[side], at, columns), at, columns), here, side)
                for side, logits in sides.items()
            }
            _add_gradient(some, sides, of_side, log_CW, here, top_id_TK, job, at, columns)
        for one in some.values():
            one.begun = True
    if some is not sums:
        for side, one in sums.items():
            one.merge(index_R, some[side])


def _logits(inputs: Sequence[Tensor], job: TiledJob) -> dict[Side, _Logits]:
    hidden_TD, head_VD, hidden_TE, head_VE = inputs
    return {
        "student": _Logits(hidden_TD, head_VD, job.scales["student"]),
        "teacher": _Logits(hidden_TE, head_VE, job.scales["teacher"]),
    }


def _view(buffer: Tensor, at: slice, columns: slice) -> Tensor:
    """Return the start of a buffer as a tile of the tokens `at` and some columns."""
    num_rows, num_columns = at.stop - at.start, columns.stop - columns.start
    return buffer[: num_rows * num_columns].view(num_rows, num_columns)


def _normalise(z_CW: Tensor, rows: dict[str, Tensor], side: Side) -> Tensor:
    """Make log-probabilities of logits in place: first the difference to the largest, so that it keeps its digits."""
    return z_CW.sub_(rows[f"{side}_top"][:, None]).add_(rows[f"{side}_max_logp"][:, None])


def _add_gradient(
    sums: Sums,
    sides: dict[Side, _Logits],
    slopes: dict[Side, divergence.Slopes],
    log_CW: dict[Side, Tensor],
    here: dict[str, Tensor],
    top_id_TK: Tensor | None,
    job: TiledJob,
    at: slice,
    columns: slice,
) -> None:
    """Add the gradient of one tile, whose log-probabilities are in memory, on each side that has `slopes`."""
    local_CK = None if top_id_TK is None else top_id_TK[at] - (job.first + columns.start)
    for side, slope in slopes.items():
        logits = sides[side]
        g_CW = divergence.gradient(log_CW[side], log_CW[OTHER[side]], slope, local_CK)
        if logits.cap is not None:
            g_CW.mul_(logits.bend(log_CW[side] + (here[f"{side}_top"] - here[f"{side}_max_logp"])[:, None]))
        g_CW = g_CW.to(logits.hidden_TD.dtype) if g_CW.is_cuda else g_CW  # of the model's dtype on a GPU, for speed
        sums[side].add(g_CW, at, columns, logits.hidden_TD, logits.head_VD)


def _row_sums(
    sides: dict[Side, _Logits],
    at: slice,
    chunks: list[slice],
    buffers: dict[Side, Tensor],
    scratch: Tensor,
    top_id_TK: Tensor | None,
    job: TiledJob,
) -> tuple[dict[str, Tensor], dict[Side, list[Tensor]]]:
    """Return the sums of the tokens `at` over the columns of all processes, and the log-probabilities of each chunk.

    The sums are, by name: largest logit and its log-probability of each side, the statistics and their terms, [C].
    """
    found: dict[str, Tensor] = {}
    tiles: dict[Side, list[Tensor]] = {}
    for side, logits in sides.items():
        tiles[side] = []
        tallies: list[Tally] = []
        for columns in chunks:
            z_CW = logits.fill(_view(buffers[side][(at.stop - at.start) * columns.start :], at, columns), at, columns)
            tiles[side].append(z_CW)
            copy_CW = _view(scratch, at, columns).copy_(z_CW)
            tallies.append(plain.tally(copy_CW, job.first + columns.start, copy_CW, with_z=False, with_sq=False))
        whole = reduce(plain.merge, tallies)
        if job.tp is not None:
            whole = reduce(plain.merge, [Tally(*part) for part in all_gather(torch.stack(whole), job.tp.group)])
        found[f"{side}_top"] = whole.top
        found[f"{side}_max_logp"] = F.logsigmoid((whole.top - whole.second) - whole.sum.log())
    parts = [
        _tile_sums(
            {side: _normalise(tiles[side][i], found, side) for side in sides},
            None if top_id_TK is None else top_id_TK[at] - (job.first + columns.start),
            job,
        )
        for i, columns in enumerate(chunks)
    ]
    for name in parts[0]:
        each = torch.stack([part[name] for part in parts])
        found[name] = each.logsumexp(0) if name in TAILS else each.sum(0)
    found = _over_processes(found, job)
    if "jsd" in job.names:
        found["jsd"] = job.beta * found["kl_teacher_m"] + (1 - job.beta) * found["kl_student_m"]
    return found, tiles


def _tile_sums(log_CW: dict[Side, Tensor], local_CK: Tensor | None, job: TiledJob) -> dict[str, Tensor]:
    """Return by name the sums over the columns of one tile."""
    found = {}
    for side, logp_CW in log_CW.items():
        if local_CK is None:
            break
        if f"{side}_top_logp" in job.names:
            found[f"{side}_top_logp"] = divergence.pick(logp_CW, local_CK)
        if f"{side}_tail_logp" in job.names:
            found[f"{side}_tail_logp"] = divergence.outside(logp_CW, local_CK).logsumexp(-1)
    return found | divergence.sums(log_CW["student"], log_CW["teacher"], job.read, job.beta) if job.read else found


def _over_processes(found: dict[str, Tensor], job: TiledJob) -> dict[str, Tensor]:
    """Return the sums over the columns of all processes."""
    if job.tp is None:
        return found
    whole = dict(found)
    for name, x in found.items():
        if name in TAILS:
            whole[name] = torch.stack(all_gather(x, job.tp.group)).logsumexp(0)
        elif not name.endswith(("_top", "_max_logp")):
            dist.all_reduce(x, group=job.tp.group)
    return whole
