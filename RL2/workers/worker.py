"""A model on any number of processes, without an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from RL2.batch.packing import microbatches, pack_tokens, stand_ins
from RL2.config.model import Lora
from RL2.errors import UserError, naming
from RL2.models.dtypes import compute_dtype
from RL2.models.lora import Adapter, adapters, add_adapters
from RL2.models.packed import PackedModel, transformers_attention
from RL2.models.policy import Policy, export, named_weights
from RL2.models.routing import RoutingSums
from RL2.models.structure import decoder_layers
from RL2.ops.attention import MAX_PADDING, is_packed
from RL2.parallel.experts import check_experts, split_experts
from RL2.parallel.fsdp import shard
from RL2.parallel.mesh import Mesh, layout_group
from RL2.parallel.processes import Processes
from RL2.parallel.tp import check_sizes, split
from RL2.types import StatsRequest, TokenBatch, TokenStats
from RL2.workers.passes import Progress, TeacherPass, forward, statistics

CHECKED_TOKENS = 64
"""Tokens per sequence that `Worker.check_packing` compares."""
PACKING_SLACK = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Mean difference of packed and lone log-probabilities that rounding explains, in nats, by compute dtype."""


class InvariantError(UserError, RuntimeError):
    """An impossible statistic, or a loss or gradient that is not finite; the optimizer step was not taken."""


class Teacher(Protocol):
    """A model whose distribution is compared with that of another (workers/teacher.py)."""

    def teaching(self, batch: TokenBatch) -> AbstractContextManager[TeacherPass]:
        """Keep the teacher on the device, with its head in memory, and give its pass over microbatches of `batch`."""
        ...

    def follow(self) -> None:
        """Take note of an optimizer step of the model that it teaches."""
        ...

    @property
    def kept_model(self) -> PackedModel | None:
        """Its model if the weights change in training, so that checkpoints hold them; else None."""
        ...


class Worker:
    """A model distributed over the processes: statistics of batches, and its weights."""

    def __init__(
        self,
        model_name: str,
        dtype: str,
        mesh: Mesh,
        processes: Processes,
        group: str = "actor",
        model: type[PackedModel] = Policy,
        offload_model: bool = False,
        lora: Lora | None = None,
        dequantize: bool = False,
    ) -> None:
        """Load `model_name` as a `model` on `mesh`, with adapters if `lora` is given.

        `dequantize` lets the checkpoint be quantised. `group` is the prefix of its configuration keys.
        """
        self.processes, self.mesh = processes, mesh
        self.teacher: Teacher | None = None
        """The teacher, for statistics that need one."""
        self.dtype = compute_dtype(dtype, processes.device)
        key = group if group.startswith("teacher.models.") else f"{group}.model_name"
        with naming(key):
            lm = model.build(model_name, dequantize)
        check_sizes(lm, mesh.tp_size, mesh.sp_size, layout_group(group))
        check_experts(lm, mesh.ep_size, layout_group(group))
        self.has_adapters = lora is not None
        if lora is not None:
            add_adapters(lm, lora, self.dtype, model_name, group)
        # split and shard before reading, so that no process ever has the whole model
        self.partial = split(lm, mesh.tp) if mesh.tp is not None else []
        """Modules whose gradients are partial sums on each tensor-parallel process."""
        experts = split_experts(lm, mesh.ep) if mesh.ep is not None else []
        self.policy = model(lm, mesh.sp, None if mesh.tp is None else mesh.tp.get_group())
        # a single process in float32 needs no sharding, and can share its weights with the engine
        if processes.world_size > 1 or self.dtype != torch.float32:
            shard(self.policy, decoder_layers(lm), mesh.shards, self.dtype, experts, mesh.expert_shards)
        self.offload_model, self.users = offload_model, 0
        self.named = f"{key}={model_name}"
        self.packing_checked = False
        with naming(key):
            self.policy.fill(model_name, torch.device("cpu") if offload_model else processes.device)

    @property
    def lm(self) -> PreTrainedModel:
        return self.policy.lm

    @property
    def can_share_weights(self) -> bool:
        """True if an engine of this process can sample from these parameters without a copy."""
        return not (isinstance(self.policy, FSDPModule) or self.offload_model or self.has_adapters)

    def stats(
        self,
        batch: TokenBatch,
        request: StatsRequest,
        max_tokens: int,
        progress: Progress = lambda done: None,
        routing: RoutingSums | None = None,
    ) -> TokenStats:
        """Return statistics at all T positions of `batch`, equal on every process; 0 where there is no action.

        `routing` says what routers do, and gets the recorded experts of all positions.
        """
        self.check_packing(batch)
        size, mine = self.mesh.data_size, self.share(batch, range(batch.num_sequences), max_tokens)
        with self.at_work("the statistics of a batch"), self.taught(batch, request) as teach:
            idle = self.stand_ins(batch, range(batch.num_sequences), max_tokens)

            def done(number: int) -> None:
                progress(number * size)

            stats = statistics(self.policy, batch, mine, request, done, routing, teach, idle)
            self._reshard()
        if routing is not None and routing.experts_T is not None:
            routing.experts_T = self.processes.sum(routing.experts_T.int(), self.mesh.data).to(torch.int16)
        return stats.map(lambda x: self.processes.sum(x, self.mesh.data))

    @contextmanager
    def taught(self, batch: TokenBatch, request: StatsRequest) -> Iterator[TeacherPass | None]:
        """Give the pass of the teacher over microbatches of `batch`, if `request` needs one."""
        if not request.needs_teacher:
            yield None
            return
        assert self.teacher is not None
        with self.teacher.teaching(batch) as teach:
            yield teach

    def check_packing(self, batch: TokenBatch) -> None:
        """Compare sequences of `batch`, packed or in a padded block, with each alone in transformers' own forward.

        Once per model. Raises InvariantError on every process if they differ by more than rounding.
        """
        by_rows = not is_packed(self.lm)
        sequences = _some_sequences(batch)
        if by_rows:
            sequences = _for_one_block(sequences)
        if self.packing_checked or len(sequences) < 2:
            return
        self.packing_checked = True
        # dropout in a layer's own code would show in training mode; the check of the structure finds it if packed
        self.policy.train(by_rows)
        request = self.policy.CHECKED
        together = pack_tokens(sequences)
        together = together.with_(group_B=torch.zeros_like(together.group_B))  # a common prefix runs once
        with self.at_work("the comparison of packed and lone sequences"), torch.no_grad():
            (packed_A,) = vars(forward(self.policy, together, request)).values()
            self.policy.eval()
            with transformers_attention(self.lm):
                lone = [
                    self.policy(pack_tokens([ids]).to(self.processes.device), None, request, alone=True)
                    for ids in sequences
                ]
            self._reshard()
        alone_A = torch.cat([value for of_one in lone for value in of_one.values()])
        gap = float((packed_A - alone_A).abs().mean() / alone_A.abs().mean().clamp(min=1))
        most = PACKING_SLACK[self.dtype]
        if not math.isfinite(float(alone_A.sum())):
            raise InvariantError(f"{self.named}: the model's own numbers are not finite; look for NaN in its weights")
        if not gap <= most:
            where = "padded block" if by_rows else "packed batch"
            raise InvariantError(
                f"{self.named}: in a {where} its sequences get numbers that differ by {gap:.2g} in the mean from "
                f"those that each gets alone through transformers' own forward (rounding explains {most:g}); "
                f"{type(self.lm).__name__} is not computed exactly here, so nothing was trained"
            )

    def share(self, batch: TokenBatch, ids: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Return this process's microbatches of the sequences `ids`: at most `max_tokens` per process sharing one."""
        mesh = self.mesh
        return microbatches(batch, ids, max_tokens * mesh.sp_size, mesh.data_size)[mesh.data_rank]

    def stand_ins(self, batch: TokenBatch, ids: Sequence[int], max_tokens: int) -> list[int]:
        """Return what runs in place of each empty microbatch of `share`; nothing without several teachers."""
        if batch.teacher_B is None:
            return []
        return stand_ins(batch, microbatches(batch, ids, max_tokens * self.mesh.sp_size, self.mesh.data_size))

    def _reshard(self) -> None:
        """Free the unsharded root module, which would stay in the compute dtype until the next backward."""
        if isinstance(self.policy, FSDPModule):
            self.policy.reshard()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight, whole and in the compute dtype, one at a time (collective)."""
        with self.at_work("gathering the weights"):
            yield from named_weights(self.lm, self.dtype)

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight as `weights` does, without its adapter (collective)."""
        with self.at_work("gathering the base weights"):
            yield from named_weights(self.lm, self.dtype, merged=False)

    def adapters(self) -> Iterator[Adapter]:
        """Yield the adapters, whole (collective)."""
        with self.at_work("gathering the adapters"):
            yield from adapters(self.lm)

    def export(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Save the model in Hugging Face format, in float32 (collective)."""
        with self.at_work("gathering the model to save"):
            export(self.lm, tokenizer, folder, self.processes.is_first)

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """Keep the model on the device; with `offload_model` it is in host memory otherwise.

        `what` describes the work, for the error if another process does not take part.
        """
        self.users += 1
        if self.offload_model and self.users == 1:
            self.policy.to(self.processes.device)
        try:
            with self.processes.expecting(f"the others in {what}"):
                yield
        finally:
            self.users -= 1
            if self.offload_model and self.users == 0:
                self.policy.to("cpu")


def _for_one_block(sequences: list[list[int]]) -> list[list[int]]:
    """Cut the sequences to one length, and the first shorter, so that they form a block with padding."""
    length = min(map(len, sequences), default=0)
    shorter = length - min(MAX_PADDING, length // 2)
    cut = [ids[: length if number else shorter] for number, ids in enumerate(sequences)]
    return [ids for ids in cut if len(ids) > 1]


def _some_sequences(batch: TokenBatch) -> list[list[int]]:
    """Return the first tokens of the first two and the last sequence of `batch`; the two halves of a single one."""
    chosen = sorted({0, min(1, batch.num_sequences - 1), batch.num_sequences - 1})
    found = []
    for b in chosen:
        start, end = batch.cu_seqlens[b : b + 2].tolist()
        found.append([*batch.token_ids_T[start:end][:CHECKED_TOKENS].tolist(), int(batch.labels_T[end - 1])])
    if len(found) == 1:
        half = len(found[0]) // 2
        found = [found[0][:half], found[0][half:]]
    return [ids for ids in found if len(ids) > 1]
