"""Passes of a model over the microbatches of one process: forward for statistics, and backward for gradients.

Shape letters: T positions of a batch, A actions of a microbatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from RL2.models.packed import PackedModel
from RL2.models.routing import RoutingSums
from RL2.ops.invariants import first_breach
from RL2.ops.one_pass import Expected
from RL2.ops.teacher_stats import Teacher
from RL2.types import SharedPrefix, StatsRequest, TokenBatch, TokenStats
from RL2.workers.metrics import LossFunction, Totals
from RL2.workers.routing import RoutingTotals
from RL2.workers.token_wise import TokenWise, weighted_loss

Progress = Callable[[int], object]
"""Called with the number of further sequences that are done."""

TeacherPass = Callable[[TokenBatch, SharedPrefix | None], Teacher]
"""Function from a microbatch and its shared prefixes, both on the device, to hidden states of its actions and head."""


def forward(
    model: PackedModel,
    microbatch: TokenBatch,
    request: StatsRequest,
    routing: RoutingSums | None = None,
    teach: TeacherPass | None = None,
    expected: Expected | None = None,
) -> TokenStats:
    """Return the statistics of the actions of `microbatch`, [A], on the device of `model`.

    Prefixes that sequences share run once. The decisions of routers are added to `routing`. The pass of a teacher comes
    first. `expected` is the loss of the actions, if it is known.
    """
    device, shared = next(model.parameters()).device, microbatch.shared()
    here = microbatch.to(device), shared and shared.to(device)
    if teach is None:
        return TokenStats(**model(*here, request, routing=routing, expected=expected))
    told, shared_told = here if microbatch.told is None else (here[0].told, microbatch.told.shared())
    assert told is not None
    teacher = teach(told, shared_told and shared_told.to(device))
    return TokenStats(**model(*here, request, routing=routing, teacher=teacher, expected=expected))


def statistics(
    model: PackedModel,
    batch: TokenBatch,
    microbatches: Sequence[Sequence[int]],
    request: StatsRequest,
    progress: Progress = lambda done: None,
    routing: RoutingSums | None = None,
    teach: TeacherPass | None = None,
    stand_ins: Sequence[int] = (),
) -> TokenStats:
    """Return statistics at all T positions of `batch`, on the CPU: 0 where there is no action, or not in this process.

    `microbatches` are the sequences of each microbatch of this process. For an empty one, its sequence of `stand_ins`
    or else the first of the batch runs, so that all processes take part in the same collectives. Recorded experts of
    all positions are put into `routing`.
    """
    model.eval()
    experts_T: Tensor | None = None
    out: dict[str, Tensor] = {}
    starts = batch.cu_seqlens.tolist()
    for ids, idle in zip(microbatches, stand_ins or [0] * len(microbatches), strict=True):
        microbatch = batch.sequences(ids or [idle])
        with torch.no_grad():
            stats = forward(model, microbatch, request, routing, teach)
        for name, value in vars(stats).items():
            out.setdefault(name, value.new_zeros(len(batch.labels_T), *value.shape[1:], device="cpu"))
            if ids:
                places = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in ids])[microbatch.action_T]
                out[name][places] = value.cpu()
        if routing is not None and routing.experts_T is not None:
            found_T = routing.experts_T.cpu()
            experts_T = found_T.new_zeros(len(batch.labels_T), *found_T.shape[1:]) if experts_T is None else experts_T
            for b, one in zip(ids, found_T.split(microbatch.lengths_B.tolist()), strict=bool(ids)):
                experts_T[starts[b] : starts[b + 1]] = one
        progress(len(ids))
    if routing is not None:
        routing.experts_T = experts_T
    return TokenStats(**out)


def trained_sequences(batch: TokenBatch) -> list[int]:
    """Return the sequences of `batch` that have some weight."""
    assert batch.weight_T is not None
    trains_T = batch.weight_T != 0
    for weight_T in (batch.observation_weight_T, batch.imitation_weight_T):
        if weight_T is not None:
            trains_T = trains_T | (weight_T != 0)
    trained: list[int] = batch.sequence_T[trains_T].unique().tolist()
    return trained


def backward(
    model: PackedModel,
    batch: TokenBatch,
    microbatches: Sequence[Sequence[int]],
    loss: LossFunction,
    request: StatsRequest,
    totals: Totals,
    progress: Progress = lambda done: None,
    routing: RoutingTotals | None = None,
    teach: TeacherPass | None = None,
    stand_ins: Sequence[int] = (),
    token_wise: TokenWise | None = None,
) -> list[str]:
    """Add the gradients of (loss_T * weight_T).sum() over `microbatches`, the sequences of each of this process.

    With `observation_weight_T`, those of the cross-entropy on observations are added, and with `imitation_weight_T`
    those of the cross-entropy on actions.

    Adds loss and metrics to `totals` and decisions of routers to `routing`, and returns the invariants of
    ops/invariants.py that do not hold. For an empty microbatch its sequence of `stand_ins`, or else the shortest of the
    batch, runs with weight 0, so that all processes take part in the same collectives. `token_wise` has what is known
    of the loss, and learns.
    """
    model.train()
    broken, shortest = list[str](), int(batch.lengths_B.argmin())
    idle_ids = stand_ins or [shortest] * len(microbatches)
    for number, (ids, idle) in enumerate(zip(microbatches, idle_ids, strict=True), start=1):
        if isinstance(model, FSDPModule):  # replicas add up their gradients once per step
            model.set_requires_all_reduce(number == len(microbatches))
        microbatch = batch.sequences(ids or [idle])
        if not ids:
            unused = {"weight_T": torch.zeros_like(microbatch.reward_T)}
            if microbatch.observation_weight_T is not None:
                unused["observation_weight_T"] = unused["weight_T"]
            if microbatch.imitation_weight_T is not None:
                unused["imitation_weight_T"] = unused["weight_T"]
            microbatch = microbatch.with_(**unused)
        seen = None if routing is None else routing.sums(model.routers)
        actions = microbatch.positions(microbatch.action_T).to(next(model.parameters()).device)
        assert actions.weight_T is not None
        # observations have another loss
        known = token_wise if microbatch.observation_weight_T is None else None
        expected = None if known is None else known.expected(loss, actions, request)
        stats = forward(model, _with_observations(microbatch), request, seen, teach, expected)
        stats, observed = _without_observations(microbatch, stats)
        total, metrics = weighted_loss(loss, stats, actions)
        if observed is not None:
            nll_N, weight_N = observed
            total = total + (nll_N * weight_N).sum()
            totals.add_mean("observation_loss", nll_N)
        if actions.imitation_weight_T is not None:
            totals.add_mean("imitation_loss", -stats.logp[actions.imitation_weight_T != 0])
        if routing is not None and seen is not None:
            total = total + routing.add(seen, counts=bool(ids)).to(total.device)
        total.backward()
        if known is not None:
            known.learn(expected, actions)
        where = _Where(ids or [idle], actions)
        totals.add(total, actions.weight_T != 0, metrics, where)
        if breach := first_breach(stats, model.lm.config.vocab_size):
            invariant, t, value = breach
            broken.append(f"{invariant} does not hold: {value:g} at {where(t)}")
        progress(len(ids))
    return broken


def _with_observations(batch: TokenBatch) -> TokenBatch:
    """Return the batch with observations that train as further actions, so that they get statistics."""
    if batch.observation_weight_T is None:
        return batch
    return batch.with_(action_T=batch.action_T | (batch.observation_weight_T != 0))


def _without_observations(batch: TokenBatch, stats: TokenStats) -> tuple[TokenStats, tuple[Tensor, Tensor] | None]:
    """Return the statistics of the actions of `batch`, and -log p and weight of each of N observations, if any train.

    `stats` are those of both, as `_with_observations` gives them.
    """
    if batch.observation_weight_T is None:
        return stats, None
    both_T = _with_observations(batch).action_T
    is_action_A = batch.action_T[both_T].to(stats.logp.device)
    weight_N = batch.observation_weight_T[both_T & ~batch.action_T].to(stats.logp.device)
    return stats.at(is_action_A), (-stats.logp[~is_action_A], weight_N)


@dataclass(frozen=True)
class _Where:
    """Descriptions of the tokens of a microbatch, for error messages."""

    ids: Sequence[int]
    actions: TokenBatch

    def __call__(self, t: int) -> str:
        b = int(self.actions.sequence_T[t])
        place = t - int(self.actions.cu_seqlens[b])
        return f"action {place} (token {int(self.actions.labels_T[t])}) of sequence {self.ids[b]}"
