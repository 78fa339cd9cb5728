"""Sampling with a model's own forward, for models that packed attention does not run.

Requests of equal length decode as one batch without padding: all samples of a prompt, and others that happen to be as
long. The model's own cache holds what it needs of their past, whatever that is: keys and values, windows of them, or
states of convolutions and recurrences.

Shapes: R rows, P prompts, L tokens of each row, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from RL2.engines.embedded.cache import Owners, pass_tokens
from RL2.engines.embedded.rows import CannotJoin, Nest, UnusableCache, bytes_per_row, join, select
from RL2.errors import first_line
from RL2.models.policy import positions
from RL2.models.routing import Routers, RoutingRecord, find_routers

logger = logging.getLogger(__name__)

CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""Names under which forwards of transformers take and return a cache."""
CHECKED_OWNERS = ([2], [3, 4], [0], [5], [1, 6])
"""Rows of each prompt when the cache is checked. Five prompts, since few other dimensions have this size."""
CHECKED_PROMPT, CHECKED_STEPS = 67, 3
"""Tokens of a prompt, more than the 64 that recurrences often take at once, and decoding steps before and after rows
leave and join."""
SLACK, HALF_SLACK = 1e-4, 0.1
"""Mean difference of log-probabilities that rounding explains, in nats, in float32 and in half precision."""

Forward = Callable[[Tensor, int, Nest], tuple[Tensor, Nest]]
"""Function (new token ids [R, L], number of earlier tokens, cache of these or None) -> (logits after the last token
[R, V], cache of all)."""


@dataclass(frozen=True)
class RowSize:
    """Memory that a request takes in a cache; by default that of its token ids."""

    fixed_bytes: float = 0.0
    bytes_per_token: float = 8.0


class OwnForward:
    """The unmodified forward of a model, with its own cache if that is exact."""

    def __init__(self, lm: PreTrainedModel, records_experts: bool = False) -> None:
        self.lm = lm
        self.recorded = find_routers(lm) if records_experts else Routers(())
        self.device = next(lm.parameters()).device
        self.accepted = inspect.signature(lm.forward).parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in self.accepted), None)
        self.chosen: tuple[Forward, RowSize] | None = None
        """The forward to sample with; None before the first request."""

    def new_cache(self, budget_bytes: float) -> LockstepCache:
        """Return an empty cache. The first call decides how the model is run, which needs its weights."""
        if self.chosen is None:
            self.chosen = self._choose()
        return LockstepCache(*self.chosen, self.device, budget_bytes, self.recorded)

    def with_cache(self, ids_RL: Tensor, start: int, cache: Nest) -> tuple[Tensor, Nest]:
        """Run the new tokens with the model's cache of the earlier ones."""
        if self.cache_name is None:
            raise UnusableCache("it has none")
        options: dict[str, Any] = {} if cache is None else {self.cache_name: cache}
        if "position_ids" in self.accepted:  # some models count from 0 in every call
            positions_L = torch.arange(start, start + ids_RL.shape[1], device=self.device)
            options["position_ids"] = positions_L.expand_as(ids_RL)
        out = self.lm(input_ids=ids_RL, use_cache=True, **options, **self._keep(1))
        if out.get(self.cache_name) is None:
            raise UnusableCache("it returns none")
        return out.logits[:, -1], out[self.cache_name]

    def without_cache(self, ids_RL: Tensor, start: int, earlier_RL: Nest) -> tuple[Tensor, Nest]:
        """Run all tokens again; the cache is their ids."""
        if earlier_RL is not None:
            ids_RL = torch.cat([earlier_RL, ids_RL], dim=1)
        rows = max(1, pass_tokens(self.device) // ids_RL.shape[1])
        return torch.cat([self._last_logits(some, 1)[:, 0] for some in ids_RL.split(rows)]), ids_RL

    def _last_logits(self, ids_RL: Tensor, number: int) -> Tensor:
        """Return the logits after each of the last tokens, [R, number, V], without a cache."""
        return self.lm(input_ids=ids_RL, use_cache=False, **self._keep(number)).logits[:, -number:]

    def _keep(self, number: int) -> dict[str, int]:
        """Return the option to compute logits of the last tokens alone, if the model has it."""
        return {"logits_to_keep": number} if "logits_to_keep" in self.accepted else {}

    def _choose(self) -> tuple[Forward, RowSize]:
        try:
            gap, row_size = self._compare()
        except torch.OutOfMemoryError:
            raise
        except UnusableCache as error:
            reason = f"its own cache cannot be used ({error})"
        except Exception as error:  # models fail in many ways
            reason = f"its own cache cannot be used ({type(error).__name__}: {first_line(error)})"
        else:
            if gap <= (SLACK if self.lm.dtype == torch.float32 else HALF_SLACK):  # False for NaN
                return self.with_cache, row_size
            reason = f"its own cache changes log-probabilities by {gap:.2g} in the mean"
        logger.warning(
            "%s samples slowly, with a forward over the whole sequence for each token: %s",
            self.lm.config.model_type,
            reason,
        )
        return self.without_cache, RowSize()

    @torch.no_grad()
    def _compare(self) -> tuple[float, RowSize]:
        """Return how much the cache changes log-probabilities, in nats, and the size of its rows.

        Rows of a small batch are repeated, decode, leave, are joined by another, and decode again.
        """
        generator = torch.Generator().manual_seed(0)

        def draw(rows: int, tokens: int) -> list[list[int]]:
            return torch.randint(self.lm.config.vocab_size, (rows, tokens), generator=generator).tolist()

        length = min(CHECKED_PROMPT, positions(self.lm.config) - 2 * CHECKED_STEPS)
        owners = dict(zip(map(tuple, draw(len(CHECKED_OWNERS), length)), CHECKED_OWNERS, strict=True))
        texts = [list(prompt) for _, prompt in sorted((row, prompt) for prompt, rows in owners.items() for row in rows)]
        cache = LockstepCache(self.with_cache, RowSize(), self.device)
        cache.prefill(owners)
        sizes, logits = [cache.bytes_per_row()], []
        for step in range(2 * CHECKED_STEPS):
            if step == CHECKED_STEPS:
                sizes.append(cache.bytes_per_row())
                cache.leave(list(range(2, len(texts))), [], [], 0)
                texts[2:] = draw(1, length + step)
                cache.prefill({tuple(texts[2]): [2]})
            tokens = [token for (token,) in draw(len(texts), 1)]
            logits.append(cache.decode(tokens, [])[:3])
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        wanted_RLV = self._last_logits(torch.tensor(texts, device=self.device), len(logits)).float().log_softmax(-1)
        # the third row counts from where it joined
        gap_RL = _difference(torch.stack(logits, 1).float().log_softmax(-1), wanted_RLV)
        gap = torch.cat([gap_RL[:2].flatten(), gap_RL[2, CHECKED_STEPS:]]).mean()
        bytes_per_token = max(0.0, sizes[1] - sizes[0]) / CHECKED_STEPS
        return float(gap), RowSize(max(0.0, sizes[0] - bytes_per_token * length), bytes_per_token)


def _difference(logp_RLV: Tensor, wanted_RLV: Tensor) -> Tensor:
    """Return the expected difference of the log-probability of a sampled token, [R, L].

    Where the model itself returns NaN it is 0: that is no fault of the cache, and the first sample reports it.
    """
    p_RLV = wanted_RLV.exp()
    return torch.where(p_RLV > 0, p_RLV * (logp_RLV - wanted_RLV).abs(), 0.0).sum(-1)


@dataclass
class Group:
    """Requests of equal length, which decode as one batch."""

    rows: list[int]
    """The engine's row of each row of the batch."""
    length: int
    """Number of tokens of each that the cache has."""
    cache: Nest


class LockstepCache:
    """A `Cache` of groups of requests of equal length, each with a cache of the model's own."""

    def __init__(
        self,
        forward: Forward,
        row_size: RowSize,
        device: torch.device,
        budget_bytes: float = 0.0,
        recorded: Routers | None = None,
    ) -> None:
        """Start without requests; the decisions of the routers `recorded` are kept in `experts`."""
        self.forward, self.row_size, self.device = forward, row_size, device
        self.budget_bytes, self.recorded = budget_bytes, recorded or Routers(())
        self.groups: list[Group] = []
        self.experts: dict[int, Tensor] = {}
        """int16 [tokens, L, K]: experts of the tokens that the last prefill or decoding ran, by row."""

    def max_rows(self, longest: int) -> int:
        # one row less than fits: rows are copied when others leave or join
        size = self.row_size.fixed_bytes + self.row_size.bytes_per_token * longest
        return max(0, int(self.budget_bytes // size) - 1)

    def add(self, row: int, length: int, like: int | None) -> bool:
        return True  # `max_rows` counts every row at its full length

    def reserve(self, lengths: list[int], keep: int, longest: int, rows: int) -> int:
        return len(lengths)  # the model's cache grows by itself

    def _run(self, rows: list[list[int]], ids_RL: Tensor, start: int, cache: Nest) -> tuple[Tensor, Nest]:
        """Run the model; `rows` are the engine's rows of each row of `ids_RL`."""
        if not len(self.recorded):
            return self.forward(ids_RL, start, cache)
        record = RoutingRecord(self.recorded)
        with record.recording():
            results = self.forward(ids_RL, start, cache)
        # a forward without a cache runs all earlier tokens too
        experts_RLLK = record.experts_NLK().cpu().unflatten(0, (len(ids_RL), -1))[:, -ids_RL.shape[1] :]
        for index, sharing in enumerate(rows):
            self.experts.update(dict.fromkeys(sharing, experts_RLLK[index]))
        return results

    def prefill(self, owners: Owners) -> Tensor:
        self.experts = {}
        logits: dict[tuple[int, ...], Tensor] = {}
        for prompts in self._passes(owners):
            sharing = [owners[prompt] for prompt in prompts]
            logits_PV, cache = self._run(sharing, torch.tensor(prompts, device=self.device), 0, None)
            logits.update(zip(prompts, logits_PV, strict=True))
            index = [p for p, prompt in enumerate(prompts) for _ in owners[prompt]]
            rows = [row for prompt in prompts for row in owners[prompt]]
            self._join(Group(rows, len(prompts[0]), select(cache, len(prompts), self._tensor(index))))
        return torch.stack([logits[prompt] for prompt in owners])

    def _passes(self, owners: Owners) -> Iterator[list[tuple[int, ...]]]:
        """Split prompts into forward passes over prompts of equal length."""
        by_length = defaultdict(list)
        for prompt in owners:
            by_length[len(prompt)].append(prompt)
        for length, prompts in by_length.items():
            size = max(1, pass_tokens(self.device) // length)
            yield from (prompts[start : start + size] for start in range(0, len(prompts), size))

    def _join(self, new: Group) -> None:
        """Add a group, to one of equal length if their caches can be joined."""
        for group in self.groups:
            if group.length == new.length:
                try:
                    group.cache = join(group.cache, len(group.rows), new.cache, len(new.rows))
                except CannotJoin:
                    continue
                group.rows += new.rows
                return
        self.groups.append(new)

    def decode(self, ids: list[int], positions: list[int]) -> Tensor:
        logits, self.experts = [], {}
        for group in self.groups:
            ids_R1 = self._tensor([ids[row] for row in group.rows])[:, None]
            logits_RV, group.cache = self._run([[row] for row in group.rows], ids_R1, group.length, group.cache)
            group.length += 1
            logits.append(logits_RV)
        rows = [row for group in self.groups for row in group.rows]
        return torch.cat(logits)[self._tensor(rows).argsort()]

    def leave(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        left, moved = set(gone), dict(zip(sources, targets, strict=True))
        for group in self.groups:
            index = [i for i, row in enumerate(group.rows) if row not in left]
            if 0 < len(index) < len(group.rows):
                group.cache = select(group.cache, len(group.rows), self._tensor(index))
            group.rows = [moved.get(group.rows[i], group.rows[i]) for i in index]
        self.groups = [group for group in self.groups if group.rows]

    def bytes_per_row(self) -> float:
        """Return the size of a row of the first group. Raise UnusableCache if a tensor does not have its rows first."""
        return bytes_per_row(self.groups[0].cache, len(self.groups[0].rows))

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)
