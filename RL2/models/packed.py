"""A transformers model that runs sequences laid end to end, alone or with the processes that share them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from RL2.errors import ConfigError
from RL2.models.inspection import length_limit
from RL2.models.loading import materialise, read_weights
from RL2.models.lora import first_value
from RL2.ops.attention import Attend, PackedAttention
from RL2.parallel.ulysses import Ulysses, spread
from RL2.types import SharedPrefix, StatsRequest, TokenBatch


class PackedModel(nn.Module, ABC):
    """Packed token ids in, numbers at the action tokens out."""

    CHECKED: ClassVar[StatsRequest]
    """Numbers by which a packed batch is compared with each sequence alone."""
    UNREAD: ClassVar[tuple[str, ...]] = ()
    """Patterns of names in a checkpoint that this model has no use for."""

    def __init__(
        self, lm: PreTrainedModel, sp: dist.ProcessGroup | None = None, tp: dist.ProcessGroup | None = None
    ) -> None:
        """`sp` splits the tokens of a batch, `tp` has split the layers; all their processes get all results."""
        super().__init__()
        self.lm, self.sp, self.tp = lm, sp, tp

    @staticmethod
    @abstractmethod
    def build(model_name: str, key: str) -> PreTrainedModel:
        """What the hub name or folder describes, without memory; `key` named it, for errors.

        Raises ConfigError for what is not there or not supported.
        """

    def initial(self, name: str, shape: torch.Size) -> Tensor | None:
        """The first value of a parameter that a checkpoint lacks; None if it may not be missing."""
        return first_value(name, shape)

    @classmethod
    def load(cls, model_name: str, key: str, device: torch.device | str = "cpu") -> Self:
        """The whole model on this process, in float32."""
        model = cls(cls.build(model_name, key))
        model.fill(model_name, key, torch.device(device))
        return model

    def fill(self, model_name: str, key: str, device: torch.device) -> None:
        """Give all parameters, whole or this process's shards, memory on `device` and the values of the checkpoint."""
        materialise(self, self.lm, device)
        read_weights(self.lm, model_name, key, self.initial, self.UNREAD)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the layers alone, which recompute activations in training. Dropout is never applied.

        Old, reference and current log-probabilities are then values of one function.
        """
        super().train(False)
        for layer in layers(self.lm):
            layer.training = mode
        return self

    @abstractmethod
    def forward(
        self, batch: TokenBatch, shared: SharedPrefix | None, request: StatsRequest, alone: bool = False
    ) -> dict[str, Tensor]:
        """Return what `request` asks for, each [number of action tokens]. `shared` is `batch.shared()`.

        With `alone`, `batch` is one sequence whose actions are all its labels, and transformers' own forward computes
        `CHECKED` of it, unpacked, under `transformers_attention`.
        """

    def hidden_of_actions(self, batch: TokenBatch, shared: SharedPrefix | None) -> tuple[Tensor, Tensor]:
        """The backbone's last hidden state at the actions that are computed here, and which of all these are.

        [number of them, D], and bool [number of actions]; without sequence parallelism they are all.
        """
        ids, positions = batch.token_ids_T, batch.position_ids_T
        place_A = batch.action_T.nonzero()[:, 0]
        if shared is not None:  # what sequences have in common runs through the backbone once
            ids, positions = ids[shared.distinct_U], positions[shared.distinct_U]
            place_A = shared.place_T[place_A]
        attention = PackedAttention(batch.cu_seqlens, shared)
        refuse_longer(self.lm, max(attention.lengths))
        attend: Attend = attention
        own = range(len(ids))
        if self.sp is not None:
            attend = Ulysses(attend, self.sp, len(ids))
            own = attend.own
        hidden_ND = backbone(self.lm)(
            input_ids=ids[None, own.start : own.stop],
            position_ids=positions[None, own.start : own.stop],
            use_cache=False,
            attend=attend,
        ).last_hidden_state[0]
        is_mine_A = (place_A >= own.start) & (place_A < own.stop)
        return hidden_ND.index_select(0, place_A[is_mine_A] - own.start), is_mine_A

    def on_all(self, stats: dict[str, Tensor], is_mine_A: Tensor) -> dict[str, Tensor]:
        """Statistics of the actions computed here -> of all actions, on each process that shares the batch."""
        if self.sp is None:
            return stats
        return {name: spread(value, is_mine_A, self.sp) for name, value in stats.items()}


def refuse_longer(lm: PreTrainedModel, longest: int) -> None:
    """Raise ConfigError if a sequence of so many positions would change the rotary frequencies of those beside it."""
    limit = length_limit(lm.config)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a sequence has {longest} tokens, and beyond {limit} {type(lm).__name__} chooses its rotary frequencies "
            "by the longest sequence of a batch, which is not supported; shorten or leave out what is longer"
        )


@contextmanager
def transformers_attention(lm: PreTrainedModel) -> Iterator[None]:
    """Let `lm` call the plain attention of transformers, and build its masks, instead of packed attention."""
    before = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


def backbone(lm: PreTrainedModel) -> nn.Module:
    return lm.base_model


def layers(lm: PreTrainedModel) -> nn.ModuleList:
    found = backbone(lm).layers
    assert isinstance(found, nn.ModuleList)
    return found
