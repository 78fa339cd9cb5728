"""Base of transformers models that run packed sequences, on one process or with sequence parallelism.

Models for which packed attention is exact run all sequences in one row. The others run row by row, through their own
forward: sequences of similar length form right-padded blocks without a mask. A causal model never sees what is to the
right, in attention as in convolutions and recurrences, so every sequence gets the numbers that it gets alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from RL2.errors import ConfigError
from RL2.models.inspection import has_rope, length_limit
from RL2.models.loading import materialise, read_weights
from RL2.models.lora import first_value
from RL2.models.routing import RoutingSums, find_routers
from RL2.models.structure import decoder_layers
from RL2.ops.attention import Attend, Blocks, PackedAttention, is_packed
from RL2.ops.one_pass import Expected
from RL2.ops.teacher_stats import Teacher
from RL2.parallel.ulysses import Ulysses, spread
from RL2.types import SharedPrefix, StatsRequest, TokenBatch

MAX_PADDED_SHARE = 1 / 8
"""Share of a row that may be padding where a model runs row by row; a few tokens of padding are always allowed."""


class PackedModel(nn.Module, ABC):
    """A model from packed token ids to one or more numbers per action token."""

    CHECKED: ClassVar[StatsRequest]
    """Statistics by which a packed batch is compared with each sequence alone."""
    UNREAD: ClassVar[tuple[str, ...]] = ()
    """Patterns of names in a checkpoint that this model does not use."""

    def __init__(
        self, lm: PreTrainedModel, sp: dist.ProcessGroup | None = None, tp: dist.ProcessGroup | None = None
    ) -> None:
        """Wrap `lm`.

        `sp` splits the tokens of a batch, `tp` has split the layers; all their processes get all results.
        """
        super().__init__()
        self.lm, self.sp, self.tp = lm, sp, tp
        self.routers = find_routers(lm)

    @staticmethod
    @abstractmethod
    def build(model_name: str, dequantize: bool = False) -> PreTrainedModel:
        """Build the model of a hub name or folder on the meta device.

        `dequantize` lets its checkpoint be quantised. Raise ModelError if it is missing or not supported.
        """

    def initial(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the initial value of a parameter that a checkpoint lacks; None if it is required."""
        return first_value(name, shape)

    @classmethod
    def load(cls, model_name: str, device: torch.device | str = "cpu", dequantize: bool = False) -> Self:
        """Load the whole model on this process, in float32."""
        model = cls(cls.build(model_name, dequantize))
        model.fill(model_name, torch.device(device))
        return model

    def fill(self, model_name: str, device: torch.device) -> None:
        """Allocate all parameters (whole or this process's shards) on `device` and load the checkpoint's values."""
        materialise(self, self.lm, device)
        read_weights(self.lm, model_name, self.initial, self.UNREAD)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the layers, which recompute activations in training mode. Dropout is never applied.

        Old, reference and current log-probabilities are therefore values of the same function.
        """
        super().train(False)
        for layer in decoder_layers(self.lm):
            layer.training = mode
        return self

    def forward(
        self,
        batch: TokenBatch,
        shared: SharedPrefix | None,
        request: StatsRequest,
        alone: bool = False,
        routing: RoutingSums | None = None,
        teacher: Teacher | None = None,
        expected: Expected | None = None,
    ) -> dict[str, Tensor]:
        """Return the statistics of `request`, each [number of action tokens]. `shared` is `batch.shared()`.

        With `alone`, `batch` is one sequence in which every label is an action; transformers' own forward computes
        `CHECKED` for it, unpacked, under `transformers_attention`. The decisions of routers are added to `routing`.
        `teacher` has the hidden states of all action tokens, for statistics that compare with it. `expected` is the
        loss of these action tokens, as far as it is known.
        """
        if alone:
            assert request == self.CHECKED
            return self.stats_alone(batch)
        hidden_ND, is_mine_A = self.hidden_of_actions(batch, shared, routing)
        if teacher is not None and self.sp is not None:
            teacher = replace(teacher, hidden_TE=teacher.hidden_TE[is_mine_A])
        if expected is not None and self.sp is not None:
            expected.tokens_N = is_mine_A.nonzero()[:, 0]
        stats = self.stats_of(hidden_ND, batch.labels_T[batch.action_T][is_mine_A], request, teacher, expected)
        if self.sp is None:
            return stats
        return {name: spread(value, is_mine_A, self.sp) for name, value in stats.items()}

    @abstractmethod
    def stats_of(
        self,
        hidden_ND: Tensor,
        labels_N: Tensor,
        request: StatsRequest,
        teacher: Teacher | None = None,
        expected: Expected | None = None,
    ) -> dict[str, Tensor]:
        """Return the statistics of `request` by name, [N] or [N, K], of the last hidden states of N actions."""

    @abstractmethod
    def stats_alone(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return `CHECKED`, [T], of the single sequence in `batch`, without packing."""

    def hidden_of_actions(
        self, batch: TokenBatch, shared: SharedPrefix | None, routing: RoutingSums | None
    ) -> tuple[Tensor, Tensor]:
        """Return the last hidden states of the actions computed on this process, and the mask of those actions.

        Shapes: [N, D] and bool [A], for N of A actions here; without sequence parallelism N = A.
        """
        if not is_packed(self.lm):
            hidden_AD = self._hidden_by_rows(batch, routing)[batch.action_T]
            return hidden_AD, torch.ones_like(hidden_AD[:, 0], dtype=torch.bool)
        ids, positions = batch.token_ids_T, batch.position_ids_T
        place_A = batch.action_T.nonzero()[:, 0]
        if shared is not None:  # a prefix that sequences share runs through the backbone once
            ids, positions = ids[shared.distinct_U], positions[shared.distinct_U]
            place_A = shared.place_T[place_A]
        attention = PackedAttention(batch.cu_seqlens, shared)
        refuse_longer(self.lm, max(attention.lengths))
        attend: Attend = attention
        own = range(len(ids))
        if self.sp is not None:
            attend = Ulysses(attend, self.sp, len(ids))
            own = attend.own
        with nullcontext() if routing is None else _seeing(routing, batch, shared):
            hidden_ND = backbone(self.lm)(
                input_ids=ids[None, own.start : own.stop],
                position_ids=positions[None, own.start : own.stop],
                use_cache=False,
                attend=attend,
            ).last_hidden_state[0]
        is_mine_A = (place_A >= own.start) & (place_A < own.stop)
        return hidden_ND.index_select(0, place_A[is_mine_A] - own.start), is_mine_A

    def _hidden_by_rows(self, batch: TokenBatch, routing: RoutingSums | None) -> Tensor:
        """Return the last hidden states of all positions, [T, D], by the model's own forward of padded blocks."""
        rows = Blocks(batch.cu_seqlens, max_share=MAX_PADDED_SHARE)
        refuse_longer(self.lm, max(rows.lengths))
        token_P, place_T = rows.places
        sizes = [number * length for number, length in rows.shapes]
        # every process gathers the shards of the parameters equally often, so some run a row that counts for nothing
        idle = range(self._most(len(sizes)) - len(sizes))
        real_P = torch.zeros_like(token_P, dtype=torch.float32).index_fill_(0, place_T, 1.0)
        given = [None] * len(sizes) if batch.experts_T is None else batch.experts_T[token_P].split(sizes)
        hidden = []
        for ids, real, experts, shape in zip(
            batch.token_ids_T[token_P].split(sizes), real_P.split(sizes), given, rows.shapes, strict=True
        ):
            with nullcontext() if routing is None else routing.seeing(real, experts):
                hidden.append(self._own_forward(ids.view(shape)).flatten(0, 1))
        if routing is not None:
            routing.end(place_T)
        hidden += [self._own_forward(batch.token_ids_T[None, :1])[0, :0] for _ in idle]
        return torch.cat(hidden).index_select(0, place_T)

    def _own_forward(self, ids_RL: Tensor) -> Tensor:
        """Return the last hidden states [R, L, D] of R rows, without a mask."""
        hidden_RLD: Tensor = backbone(self.lm)(input_ids=ids_RL, use_cache=False).last_hidden_state
        return hidden_RLD

    def _most(self, number: int) -> int:
        """Return the maximum of `number` over the processes that share this model's parameters (collective)."""
        if not isinstance(self, FSDPModule):
            return number
        most = torch.tensor(number, device=next(self.parameters()).device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)


@contextmanager
def _seeing(routing: RoutingSums, batch: TokenBatch, shared: SharedPrefix | None) -> Iterator[None]:
    """Add the decisions for a packed batch to `routing`; a token that sequences share counts once for each of them."""
    place_T = torch.arange(len(batch.token_ids_T), device=batch.token_ids_T.device)
    given_NLK = batch.experts_T
    if shared is not None:
        place_T = shared.place_T
        given_NLK = None if given_NLK is None else given_NLK[shared.distinct_U]
    with routing.seeing(place_T.bincount().float(), given_NLK):
        yield
    routing.end(place_T)


def refuse_longer(lm: PreTrainedModel, longest: int) -> None:
    """Raise ConfigError if a sequence of this length would change the rotary frequencies of the others in its batch.

    A model that runs row by row without rotary embeddings may have a table of positions, which ends.
    """
    limit = length_limit(lm.config)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a sequence has {longest} tokens, but beyond {limit} {type(lm).__name__} chooses its rotary frequencies "
            "by the longest sequence of a batch, which is not supported; shorten or remove longer sequences"
        )
    positions = getattr(lm.config, "max_position_embeddings", None) or 0
    if not is_packed(lm) and not has_rope(lm.config) and 0 < positions < longest:
        raise ConfigError(
            f"a sequence has {longest} tokens, but {type(lm).__name__} has {positions} positions; shorten or remove "
            "longer sequences"
        )


@contextmanager
def transformers_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Let a packed `lm` use transformers' own eager attention and masks within the `with` block."""
    if not is_packed(lm):
        yield
        return
    before = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


def backbone(lm: PreTrainedModel) -> nn.Module:
    """Return the model without its head."""
    return lm.base_model
