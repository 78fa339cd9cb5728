"""Prefill and decoding of a model with packed attention; its keys and values are in a `KVCache`.

Shapes: R rows, P prompts, T packed tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from RL2.engines.embedded.cache import PREFILL_TOKENS, Owners, pass_tokens
from RL2.engines.embedded.compiled import CompiledStep, Step
from RL2.models.inspection import attention_windows, logit_transform
from RL2.models.packed import backbone
from RL2.models.policy import head
from RL2.models.routing import Routers, RoutingRecord, find_routers
from RL2.models.structure import decoder_layers
from RL2.ops.attention import IN_GRAPH, Attend
from RL2.ops.token_stats import UNCHANGED


class PackedForward:
    """The forward pass of a model with packed attention."""

    def __init__(self, lm: PreTrainedModel, compiles: bool, records_experts: bool = False) -> None:
        """Run `lm`. `compiles` fuses kernels: on GPUs those of a layer, on CPUs all of a decoding step."""
        self.lm = lm
        self.recorded = find_routers(lm) if records_experts else Routers(())
        """Routers whose decisions a cache keeps."""
        transform = logit_transform(lm)
        self.logit_transform = None if transform == UNCHANGED else transform
        self.windows = attention_windows(lm)
        """Number of a layer -> its sliding window, for the layers that have one."""
        self.device = next(lm.parameters()).device
        self.prefilled = 0
        """Number of positions that prefills have computed."""
        self.step: Step = self.logits
        if compiles and self.device.type == "cuda":
            for layer in decoder_layers(lm):
                layer.compile(dynamic=True)
        elif compiles:
            lm.set_attn_implementation(IN_GRAPH)
            self.step = CompiledStep(self.logits)

    def logits(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the logits [T, V]."""
        return self.logits_of(self.hidden(ids, positions, attend))

    def logits_of(self, hidden_TD: Tensor) -> Tensor:
        """Return the logits [T, V] of hidden states; a factor or soft cap after the head is applied in float32."""
        logits_TV: Tensor = head(self.lm)(hidden_TD)
        return logits_TV if self.logit_transform is None else self.logit_transform(logits_TV.float())

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the last hidden states [T, D]."""
        out = backbone(self.lm)(input_ids=ids[None], position_ids=positions[None], use_cache=False, attend=attend)
        return out.last_hidden_state[0]


class Piece(NamedTuple):
    """Tokens `start` to `end` of a prompt, and the rows that share the prompt."""

    rows: list[int]
    start: int
    end: int


Part = tuple[tuple[int, ...], Piece]
"""A prompt, and the part of it that has to be run."""


class KVCache(ABC):
    """Base of the caches of keys and values. Prompts run packed, a long one in pieces."""

    def __init__(self, model: PackedForward) -> None:
        self.model, self.device = model, model.device
        self.experts: dict[int, Tensor] = {}

    @abstractmethod
    def attention(self, pieces: list[Piece]) -> Attend:
        """Return the attention of packed pieces of prompts; the earlier pieces of each are in the cache."""

    @abstractmethod
    def run_several(self, ids: list[list[int]], positions: list[int]) -> Tensor:
        """Run several new tokens of each row, the first at its position; return the logits after each, [T, V].

        A later pass that gives positions again overwrites what they hold.
        """

    @abstractmethod
    def has_room(self, lengths: list[int]) -> bool:
        """Return whether the rows can grow to `lengths` tokens without another row leaving."""

    @abstractmethod
    def run_step(self, ids: list[int], positions: list[int]) -> Tensor:
        """Run one new token per row, at its position; return the logits [R, V]."""

    def decode(self, ids: list[int], positions: list[int]) -> Tensor:
        self.experts = {}
        with self._recording([1] * len(ids), [[row] for row in range(len(ids))]):
            return self.run_step(ids, positions)

    def verify(self, ids: list[list[int]], positions: list[int]) -> Tensor:
        """Run the last token of each row and guesses of those behind it; return the logits after each, [T, V]."""
        self.experts = {}
        with self._recording([len(new) for new in ids], [[row] for row in range(len(ids))]):
            return self.run_several(ids, positions)

    def prefill(self, owners: Owners) -> Tensor:
        self.experts = {}
        new = [Piece(rows, self.restore(prompt, rows), len(prompt)) for prompt, rows in owners.items()]
        return torch.cat([self._pass(some) for some in self._passes(list(zip(owners, new, strict=True)))])

    def restore(self, prompt: tuple[int, ...], rows: list[int]) -> int:
        """Give the rows the keys and values of the prompt that are known already; return for how many tokens."""
        return 0

    def keep(self, row: int, token_ids: list[int]) -> None:  # noqa: B027
        """Keep the keys and values of a row, which are those of `token_ids`, for later requests."""

    def _passes(self, prompts: list[Part]) -> Iterator[list[Part]]:
        """Split prompts into forward passes."""
        some: list[Part] = []
        tokens = 0
        for prompt, new in prompts:
            if some and tokens + new.end - new.start > pass_tokens(self.device):
                yield some
                some, tokens = [], 0
            some.append((prompt, new))
            tokens += new.end - new.start
        yield some

    def _pass(self, prompts: list[Part]) -> Tensor:
        """Return the logits after each prompt. A prompt that is too long for one pass is alone and runs in pieces."""
        for done in range(0, max(new.end - new.start for _, new in prompts), PREFILL_TOKENS):
            pieces = [
                Piece(new.rows, new.start + done, min(new.end, new.start + done + PREFILL_TOKENS)) for _, new in prompts
            ]
            ids = [prompt[piece.start : piece.end] for (prompt, _), piece in zip(prompts, pieces, strict=True)]
            logits_PV = self._run(ids, pieces)
        return logits_PV

    def _run(self, prompts: list[tuple[int, ...]], pieces: list[Piece]) -> Tensor:
        """Return the logits after each piece."""
        ids = torch.tensor([i for prompt in prompts for i in prompt], device=self.device)
        positions = torch.cat([torch.arange(piece.start, piece.end, device=self.device) for piece in pieces])
        last = torch.tensor([len(prompt) for prompt in prompts], device=self.device).cumsum(0) - 1
        self.model.prefilled += len(ids)
        with self._recording([piece.end - piece.start for piece in pieces], [piece.rows for piece in pieces]):
            hidden_TD = self.model.hidden(ids, positions, self.attention(pieces))
        return self.model.logits_of(hidden_TD[last])

    @contextmanager
    def _recording(self, lengths: list[int], rows: list[list[int]]) -> Iterator[None]:
        """Add to `experts` those of the tokens that run in the `with` block: parts of some lengths, each of `rows`."""
        if not len(self.model.recorded):
            yield
            return
        record = RoutingRecord(self.model.recorded)
        with record.recording():
            yield
        found_NLK = record.experts_NLK().cpu()[: sum(lengths)]  # rows of padding come last
        for part, sharing in zip(found_NLK.split(lengths), rows, strict=True):
            for row in sharing:
                self.experts[row] = torch.cat([self.experts[row], part]) if row in self.experts else part
