"""Token statistics: the only training code that sees logits. ops/tally.py holds the mathematics.

Shapes: T tokens, V vocabulary, D hidden size, C tokens and W columns of one tile, K of the most likely tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from RL2.ops import tally as plain
from RL2.ops.tally import Rows, Tally, Top
from RL2.ops.tiles import (
    BUDGET_MIB,
    CPU_TILE_MIB,
    TILE_TOKENS,
    accumulation_dtype,
    add_product,
    all_gather,
    gathered_head,
    product,
    slices,
)
from RL2.types import MENU, TEACHER_MENU, TokenStats

Implementation = Literal["auto", "reference", "chunked", "triton"]


@dataclass(frozen=True)
class VocabularyShard:
    """Shard of the head: its rows are the tokens from `start` on, out of `total`; `group` holds the rest.

    All processes of the group have the same hidden states and get the same statistics.
    """

    group: dist.ProcessGroup
    start: int
    total: int


@dataclass(frozen=True)
class LogitTransform:
    """Change of the logits after the head: c tanh(s z / c) with scale s and soft cap c; s z without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return the changed logits."""
        z = z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


UNCHANGED = LogitTransform()
"""The transform of models whose logits are the result of the head."""


def token_stats(
    hidden_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    *,
    temperature: float = 1.0,
    transform: LogitTransform = UNCHANGED,
    fields: Sequence[str],
    top_k: int = 0,
    tp: VocabularyShard | None = None,
    implementation: Implementation = "auto",
    budget_mib: float | None = None,
) -> TokenStats:
    """Return statistics of softmax(transform(hidden @ head.T) / temperature) at each token.

    They are differentiable in `hidden` and `head`. `fields` names the statistics, out of `types.MENU`; `top_k` is the
    K of `top_logp` and `top_id`. Results are float32 [T] (float64 for float64 inputs), or [T, K]. Half-precision inputs
    are multiplied with float32 accumulation.

    `reference` builds dense logits for autograd. `chunked` holds `budget_mib` of logits at a time and recomputes them
    in the backward pass, whose gradient is in closed form. `triton` does the same with two GPU kernels. `auto` is
    `triton` on a GPU and `chunked` elsewhere.

    Raise ValueError for an unknown field, for `top_k` that does not match the fields, and for a label outside the
    vocabulary, such as -100: exclude tokens by `weight_T` instead.
    """
    check_fields(fields, top_k)
    check_labels(labels_T, len(head_VD) if tp is None else tp.total)
    if implementation == "reference":
        whole_VD = head_VD if tp is None else gathered_head(head_VD, tp.group)
        logits_TV = transform(product(hidden_TD, whole_VD.T)) / temperature
        return reference_stats(logits_TV, labels_T, fields, top_k)
    if implementation == "auto":
        implementation = "triton" if hidden_TD.is_cuda and find_spec("triton") else "chunked"
    names = tuple(name for name in MENU if name in fields)
    cap = transform.softcap and transform.softcap / temperature
    job = _Job(names, top_k, transform.scale / temperature, cap, tp, implementation == "triton", budget_mib)
    return TokenStats(**dict(zip(names, _Chunked.apply(hidden_TD, head_VD, labels_T, job), strict=True)))


def check_fields(fields: Sequence[str], top_k: int) -> None:
    """Raise ValueError for a field that is not on the menu, or `top_k` that does not match the fields."""
    if taught := [name for name in fields if name in TEACHER_MENU]:
        raise ValueError(f"no teacher is given, and {', '.join(taught)} need one: call RL2.ops.teacher_stats")
    if unknown := set(fields) - set(MENU):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; the menu is {', '.join(MENU)}")
    wants_top = bool({"top_logp", "top_id"} & set(fields))
    if wants_top != (top_k > 0):
        raise ValueError(f"top_k={top_k} and the fields {', '.join(fields)}: top_logp and top_id need top_k above 0")


def check_labels(labels_T: Tensor, vocabulary: int) -> None:
    """Raise ValueError unless all labels are tokens. It synchronises with the device once per call, not per tile."""
    if not len(labels_T):
        return
    smallest, largest = torch.stack(torch.aminmax(labels_T)).tolist()
    if smallest < 0 or largest >= vocabulary:
        wrong = smallest if smallest < 0 else largest
        place = int((labels_T == wrong).nonzero()[0, 0])
        raise ValueError(f"labels_T[{place}]={wrong} is not one of the {vocabulary} tokens of the vocabulary")


def reference_stats(logits_TV: Tensor, labels_T: Tensor, fields: Sequence[str], top_k: int = 0) -> TokenStats:
    """Return statistics by their dense definition, in the dtype of the logits (float64 for tests)."""
    logp_TV = logits_TV.log_softmax(-1)
    order_TV = logits_TV.sort(dim=-1, descending=True, stable=True).indices  # equal logits by id
    top_id_TK = order_TV[:, :top_k]

    def log_of_the_others(label_T: Tensor) -> Tensor:
        others_TV = logits_TV.scatter(1, label_T[:, None], -torch.inf)
        return others_TV.logsumexp(-1) - logits_TV.logsumexp(-1)

    menu = {
        "logp": lambda: logp_TV.gather(1, labels_T[:, None])[:, 0],
        "log1mp": lambda: log_of_the_others(labels_T),
        "max_logp": lambda: logp_TV.gather(1, order_TV[:, :1])[:, 0],
        "max_log1mp": lambda: log_of_the_others(order_TV[:, 0]),
        "entropy": lambda: -(logp_TV.exp() * logp_TV).sum(-1),
        "rank": lambda: (order_TV == labels_T[:, None]).to(logp_TV.dtype).argmax(-1).to(logp_TV.dtype) + 1,
        "top_logp": lambda: logp_TV.gather(1, top_id_TK),
        "top_id": lambda: top_id_TK,
        "sum_p2": lambda: logp_TV.exp().square().sum(-1),
    }
    return TokenStats(**{name: menu[name]() for name in fields})


@dataclass(frozen=True)
class _Job:
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

    def tile_shape(self, num_tokens: int, vocabulary: int, device: torch.device) -> tuple[int, int]:
        """Return tokens and columns per tile. For `rank`, a tile has all columns: the label's logit is needed first.

        The shape is equal on all processes of a tensor-parallel group, since each tile ends in collectives.
        """
        if self.tp is not None:
            vocabulary = math.ceil(self.tp.total / dist.get_world_size(self.tp.group))
        budget = int((self.budget_mib or BUDGET_MIB[device.type]) * 2**20) // 4
        if self.wants_rank:
            return max(1, min(num_tokens, budget // vocabulary)), vocabulary
        if device.type == "cpu":
            budget = min(budget, int(CPU_TILE_MIB * 2**20) // 4)
        tokens = max(1, min(num_tokens, TILE_TOKENS[device.type], budget))
        return tokens, max(1, min(vocabulary, budget // tokens))


class _Chunked(torch.autograd.Function):
    """Tiled statistics. The forward pass keeps nothing of size [T, V]; the backward pass recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, job: _Job) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a statistic that no loss reads costs nothing in the backward pass
        tiles = _Tiles(hidden_TD, head_VD, job, backward=False)
        whole = _forward(tiles, labels_T, job)
        out = tuple(whole[name] for name in job.names)
        ctx.mark_non_differentiable(*(whole[name] for name in ("rank", "top_id") if name in job.names))
        kept = {name: whole[name] for name in (*Rows._fields, "top_id") if name in whole}
        ctx.job, ctx.kept = job, tuple(kept)
        # fields that are outputs are saved as such; the others are copies of size [T]
        ctx.save_for_backward(hidden_TD, head_VD, labels_T, *kept.values())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        asked = {name: grad for name, grad in zip(job.names, grads, strict=True) if grad is not None}
        hidden_TD, head_VD, labels_T, *kept = ctx.saved_tensors
        saved = dict(zip(ctx.kept, kept, strict=True))
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        # accumulated over tiles in float32 for any dtype of the model; the first tile sets, the others add
        grad_hidden_TD = torch.empty_like(hidden_TD, dtype=accumulation_dtype(hidden_TD)) if needs_hidden else None
        grad_head_VD = torch.empty_like(head_VD, dtype=accumulation_dtype(hidden_TD)) if needs_head else None
        tiles = _Tiles(hidden_TD, head_VD, job, backward=True)
        for at in tiles.tokens:
            slope = plain.slopes(
                Rows(*(saved[name][at] for name in Rows._fields)),
                labels_T[at],
                saved["top_id"][at] if "top_id" in saved else None,
                {name: grad[at] for name, grad in asked.items()},
                job.factor,
            )
            for columns, z_CW, scratch_CW, start in tiles.logits(at):
                bend_CW = None if job.cap is None else 1 - (z_CW / job.cap).square_()  # the derivative of the soft cap
                grad_CW = job.ops.gradient(z_CW, start, scratch_CW, slope, tiles.grad_dtype)
                if bend_CW is not None:
                    grad_CW.mul_(bend_CW)
                if grad_hidden_TD is not None:
                    add_product(grad_hidden_TD[at], grad_CW, head_VD[columns], beta=float(columns.start > 0))
                if grad_head_VD is not None:
                    add_product(grad_head_VD[columns], grad_CW.T, hidden_TD[at], beta=float(at.start > 0))
        if grad_hidden_TD is not None:
            if job.tp is not None:
                dist.all_reduce(grad_hidden_TD, group=job.tp.group)
            grad_hidden_TD = grad_hidden_TD.to(hidden_TD.dtype)
        return grad_hidden_TD, None if grad_head_VD is None else grad_head_VD.to(head_VD.dtype), None, None


class _Tiles:
    """Tiles of transform(hidden @ head.T) / temperature, in two buffers that all tiles share."""

    def __init__(self, hidden_TD: Tensor, head_VD: Tensor, job: _Job, *, backward: bool) -> None:
        self.hidden_TD, self.head_VD, self.factor, self.cap = hidden_TD, head_VD, job.factor, job.cap
        self.first = 0 if job.tp is None else job.tp.start
        self.num_tokens, self.width = job.tile_shape(len(hidden_TD), len(head_VD), hidden_TD.device)
        size = self.num_tokens * min(self.width, len(head_VD))
        self.buffer = hidden_TD.new_empty(size, dtype=accumulation_dtype(hidden_TD))
        self.grad_dtype = hidden_TD.dtype if hidden_TD.is_cuda else self.buffer.dtype
        """Dtype of the gradient that enters matrix products: on a GPU that of the model, for speed."""
        # the kernels need scratch only for a gradient of another dtype
        in_place = job.triton and not (backward and self.grad_dtype != self.buffer.dtype)
        scratch_dtype = self.grad_dtype if job.triton else self.buffer.dtype
        self.scratch = self.buffer if in_place else self.buffer.new_empty(size, dtype=scratch_dtype)

    @property
    def tokens(self) -> list[slice]:
        """Slices of tokens; at least one, so that an empty batch has statistics of size 0."""
        return slices(len(self.hidden_TD), self.num_tokens) or [slice(0, 0)]

    def logits(self, at: slice) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
        """Yield for the tokens `at`: a tile's columns, its logits, scratch of the same size, and its first token id."""
        hidden_CD = self.hidden_TD[at]
        for columns in slices(len(self.head_VD), self.width):
            head_WD = self.head_VD[columns]
            shape = (len(hidden_CD), len(head_WD))
            z_CW, scratch_CW = (x[: shape[0] * shape[1]].view(shape) for x in (self.buffer, self.scratch))
            add_product(z_CW, hidden_CD, head_WD.T, beta=0.0, alpha=self.factor)
            if self.cap is not None:
                z_CW.div_(self.cap).tanh_().mul_(self.cap)
            yield columns, z_CW, scratch_CW, self.first + columns.start


def _forward(tiles: _Tiles, labels_T: Tensor, job: _Job) -> dict[str, Tensor]:
    """Return the statistics of all tokens by name: all of `Rows`, and the other fields of the job."""
    parts = [_tile_stats(tiles, at, labels_T[at], job) for at in tiles.tokens]
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


def _tile_stats(tiles: _Tiles, at: slice, labels_C: Tensor, job: _Job) -> tuple[Tally, Tensor, Tensor, Top]:
    """Return tally, label's logit, number of tokens before the label, and K best, from this process's columns."""
    label_logit_C = tiles.buffer.new_zeros(len(labels_C))
    before_C = torch.zeros_like(labels_C)
    tallies: list[Tally] = []
    tops: list[Top] = []
    for _, z_CW, scratch_CW, start in tiles.logits(at):
        label_logit_C += plain.pick(z_CW, labels_C - start)
        if job.wants_rank:  # these tokens have a single tile
            if job.tp is not None:
                dist.all_reduce(label_logit_C, group=job.tp.group)
            before_C = job.ops.count_above(z_CW, start, labels_C, label_logit_C)
        if job.top_k:
            tops.append(plain.top(z_CW, start, job.top_k))
        tallies.append(
            job.ops.tally(z_CW, start, scratch_CW, with_z="entropy" in job.names, with_sq="sum_p2" in job.names)
        )
    best = label_logit_C, labels_C  # unused
    if tops:
        values, ids = (torch.cat(parts, -1) for parts in zip(*tops, strict=True))
        best = plain.ordered(values, ids, job.top_k)
    return reduce(plain.merge, tallies), label_logit_C, before_C, best


def _top_over_processes(value_TK: Tensor, id_TK: Tensor, job: _Job) -> Top:
    """Return the K best over all processes."""
    if job.tp is not None:
        short = job.top_k - value_TK.shape[1]  # for a shard with fewer than K tokens
        padded = F.pad(value_TK, (0, short), value=-torch.inf), F.pad(id_TK, (0, short), value=job.tp.total)
        value_TK, id_TK = (torch.cat(all_gather(x.contiguous(), job.tp.group), -1) for x in padded)
        value_TK, id_TK = plain.ordered(value_TK, id_TK, min(job.top_k, job.tp.total))
    if value_TK.shape[1] < job.top_k:
        raise ValueError(f"top_k={job.top_k} must be at most the vocabulary, {value_TK.shape[1]} tokens")
    return value_TK, id_TK
