"""Sampling with a model's own forward, for models that packed attention does not run.

All requests decode as one batch, with the model's own cache of their past, whatever that is: keys and values, windows
of them, or states of convolutions and recurrences. Keys and values of shorter requests are padded on the left; states
have one size for all lengths. Prompts of different lengths run separately, since a recurrence would see their padding.
A model that is not exact with padding decodes requests of equal length as one batch; one that has no exact cache runs
whole sequences.

Shapes: R rows, P prompts, L tokens of each row, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from RL2.engines.embedded.cache import Owners, pass_tokens
from RL2.engines.embedded.rows import CannotJoin, Nest, UnusableCache, bytes_per_row, has_keys, join, pad_left, select
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
CHECKED_SHORTER = (0, 1, 8, 0, 23)
"""Tokens by which each prompt is shorter if lengths differ. The rows of the longest leave."""
SLACK, HALF_SLACK = 1e-4, 0.1
"""Mean difference of log-probabilities that rounding explains, in nats, in float32 and in half precision."""

Forward = Callable[[Tensor, Sequence[int], Nest], tuple[Tensor, Nest]]
"""Function (new token ids [R, L], number of earlier tokens of each row, cache of these or None) -> (logits after the
last token [R, V], cache of all)."""


@dataclass(frozen=True)
class RowSize:
    """Memory that a request takes in a cache; by default that of its token ids."""

    fixed_bytes: float = 0.0
    bytes_per_token: float = 8.0


@dataclass(frozen=True)
class Decoding:
    """The way in which a model decodes."""

    forward: Forward
    row_size: RowSize = field(default_factory=RowSize)
    is_ragged: bool = False
    """True if requests of different lengths decode as one batch."""


class OwnForward:
    """The unmodified forward of a model, with its own cache if that is exact."""

    def __init__(self, lm: PreTrainedModel, records_experts: bool = False) -> None:
        self.lm = lm
        self.recorded = find_routers(lm) if records_experts else Routers(())
        self.device = next(lm.parameters()).device
        self.accepted = inspect.signature(lm.forward).parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in self.accepted), None)
        self.chosen: Decoding | None = None
        """The fastest exact way to decode; None before the first request."""

    def new_cache(self, budget_bytes: float) -> LockstepCache:
        """Return an empty cache. The first call decides how the model is run, which needs its weights."""
        if self.chosen is None:
            self.chosen = self._choose()
        return LockstepCache(self.chosen, self.device, budget_bytes, self.recorded)

    def with_cache(self, ids_RL: Tensor, earlier: Sequence[int], cache: Nest) -> tuple[Tensor, Nest]:
        """Run the new tokens with the model's cache of the earlier ones."""
        if self.cache_name is None:
            raise UnusableCache("it has none")
        options: dict[str, Any] = {} if cache is None else {self.cache_name: cache}
        earlier_R1 = torch.tensor(earlier, device=self.device)[:, None]
        if "position_ids" in self.accepted:  # some models count from 0 in every call
            options["position_ids"] = earlier_R1 + torch.arange(ids_RL.shape[1], device=self.device)
        if min(earlier) < max(earlier) and has_keys(cache):  # some recurrences misread a mask
            columns = torch.arange(max(earlier) + ids_RL.shape[1], device=self.device)
            options["attention_mask"] = (columns >= max(earlier) - earlier_R1).long()
        out = self.lm(input_ids=ids_RL, use_cache=True, **options, **self._keep(1))
        if out.get(self.cache_name) is None:
            raise UnusableCache("it returns none")
        return out.logits[:, -1], out[self.cache_name]

    def without_cache(self, ids_RL: Tensor, earlier: Sequence[int], earlier_RL: Nest) -> tuple[Tensor, Nest]:
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

    def _choose(self) -> Decoding:
        """Return the fastest way to decode that is exact with the weights in use."""
        decoding, how = Decoding(self.without_cache), "with a forward over the whole sequence for each token"
        reason = ""
        for is_ragged in (True, False):
            try:
                gap, row_size = self._compare(is_ragged)
            except torch.OutOfMemoryError:
                raise
            except UnusableCache as error:
                reason = f"its own cache cannot be used ({error})"
            except Exception as error:  # models fail in many ways
                reason = f"its own cache cannot be used ({type(error).__name__}: {first_line(error)})"
            else:
                if gap <= (SLACK if self.lm.dtype == torch.float32 else HALF_SLACK):  # False for NaN
                    decoding, how = Decoding(self.with_cache, row_size, is_ragged), "in batches of equal length"
                    break
                padded = "padded, " if is_ragged else ""
                reason = f"{padded}its own cache changes log-probabilities by {gap:.2g} in the mean"
        if not decoding.is_ragged:
            logger.warning("%s samples slowly, %s: %s", self.lm.config.model_type, how, reason)
        return decoding

    @torch.no_grad()
    def _compare(self, is_ragged: bool) -> tuple[float, RowSize]:
        """Return how much the cache changes log-probabilities, in nats, and the size of its rows.

        Rows of a small batch are repeated, decode, leave, are joined by another, and decode again.
        """
        generator = torch.Generator().manual_seed(0)

        def draw(tokens: int) -> list[int]:
            return torch.randint(self.lm.config.vocab_size, (tokens,), generator=generator).tolist()

        length = min(CHECKED_PROMPT, positions(self.lm.config) - 2 * CHECKED_STEPS)
        lengths = [max(1, length - shorter * is_ragged) for shorter in CHECKED_SHORTER]
        owners = dict(zip([tuple(draw(tokens)) for tokens in lengths], CHECKED_OWNERS, strict=True))
        texts = [list(prompt) for _, prompt in sorted((row, prompt) for prompt, rows in owners.items() for row in rows)]
        cache = LockstepCache(Decoding(self.with_cache, is_ragged=is_ragged), self.device)
        cache.prefill(owners)
        sizes, logits = [cache.bytes_per_row()], []
        for step in range(2 * CHECKED_STEPS):
            if step == CHECKED_STEPS:
                sizes.append(cache.bytes_per_row())
                cache.leave(list(range(2, len(texts))), [], [], 0)
                texts[2:] = [draw(length + step)]
                cache.prefill({tuple(texts[2]): [2]})
            if is_ragged and len(cache.groups) > 1:
                raise UnusableCache("requests of different lengths cannot join")
            tokens = draw(len(texts))
            logits.append(cache.decode(tokens, [])[:3])
            texts = [[*text, token] for text, token in zip(texts, tokens, strict=True)]
        wanted_RLV = torch.cat([self._last_logits(self._tensor([text]), len(logits)) for text in texts])
        # the third row counts from where it joined
        gap_RL = _difference(torch.stack(logits, 1).float().log_softmax(-1), wanted_RLV.float().log_softmax(-1))
        gap = torch.cat([gap_RL[:2].flatten(), gap_RL[2, CHECKED_STEPS:]]).mean()
        bytes_per_token = max(0.0, sizes[1] - sizes[0]) / CHECKED_STEPS
        return float(gap), RowSize(max(0.0, sizes[0] - bytes_per_token * length), bytes_per_token)

    def _tensor(self, numbers: list[list[int]]) -> Tensor:
        return torch.tensor(numbers, device=self.device)


def _difference(logp_RLV: Tensor, wanted_RLV: Tensor) -> Tensor:
    """Return the expected difference of the log-probability of a sampled token, [R, L].

    Where the model itself returns NaN it is 0: that is no fault of the cache, and the first sample reports it.
    """
    p_RLV = wanted_RLV.exp()
    return torch.where(p_RLV > 0, p_RLV * (logp_RLV - wanted_RLV).abs(), 0.0).sum(-1)


@dataclass
class Group:
    """Requests that decode as one batch."""

    rows: list[int]
    """The engine's row of each row of the batch."""
    lengths: list[int]
    """Number of tokens of each that the cache has."""
    cache: Nest

    @property
    def length(self) -> int:
        """Number of tokens for which the cache has keys and values, padding included."""
        return max(self.lengths)

    def leave(self, gone: Container[int], device: torch.device) -> None:
        """Remove rows, and the padding that the others no longer need."""
        length, rows = self.length, len(self.rows)
        index = [i for i, row in enumerate(self.rows) if row not in gone]
        self.rows, self.lengths = [self.rows[i] for i in index], [self.lengths[i] for i in index]
        if 0 < len(index) < rows:
            kept = select(self.cache, rows, torch.tensor(index, device=device))
            self.cache = pad_left(kept, self.length - length)


class LockstepCache:
    """A `Cache` of groups of requests that decode together, each with a cache of the model's own."""

    def __init__(
        self,
        decoding: Decoding,
        device: torch.device,
        budget_bytes: float = 0.0,
        recorded: Routers | None = None,
    ) -> None:
        """Start without requests; the decisions of the routers `recorded` are kept in `experts`."""
        self.decoding, self.device = decoding, device
        self.budget_bytes, self.recorded = budget_bytes, recorded or Routers(())
        self.groups: list[Group] = []
        self.experts: dict[int, Tensor] = {}

    def max_rows(self, longest: int) -> int:
        # one row less than fits: rows are copied when others leave or join; padding is part of the full length
        size = self.decoding.row_size.fixed_bytes + self.decoding.row_size.bytes_per_token * longest
        return max(0, int(self.budget_bytes // size) - 1)

    def add(self, row: int, length: int, like: int | None) -> bool:
        return True  # `max_rows` counts every row at its full length

    def reserve(self, lengths: list[int], keep: int, longest: int, rows: int) -> int:
        return len(lengths)  # the model's cache grows by itself

    def _run(self, rows: list[list[int]], ids_RL: Tensor, earlier: list[int], cache: Nest) -> tuple[Tensor, Nest]:
        """Run the model; `rows` are the engine's rows of each row of `ids_RL`."""
        if not len(self.recorded):
            return self.decoding.forward(ids_RL, earlier, cache)
        record = RoutingRecord(self.recorded)
        with record.recording():
            results = self.decoding.forward(ids_RL, earlier, cache)
        # a forward without a cache runs all earlier tokens too
        experts_RLLK = record.experts_NLK().cpu().unflatten(0, (len(ids_RL), -1))[:, -ids_RL.shape[1] :]
        for index, sharing in enumerate(rows):
            self.experts.update(dict.fromkeys(sharing, experts_RLLK[index]))
        return results

    def prefill(self, owners: Owners) -> Tensor:
        self.experts = {}
        logits: dict[tuple[int, ...], Tensor] = {}
        groups = []
        for prompts in self._passes(owners):
            sharing = [owners[prompt] for prompt in prompts]
            ids_PL = torch.tensor(prompts, device=self.device)
            logits_PV, cache = self._run(sharing, ids_PL, [0] * len(prompts), None)
            logits.update(zip(prompts, logits_PV, strict=True))
            index = [p for p, prompt in enumerate(prompts) for _ in owners[prompt]]
            rows = [row for prompt in prompts for row in owners[prompt]]
            lengths = [ids_PL.shape[1]] * len(rows)
            groups.append(Group(rows, lengths, select(cache, len(prompts), self._tensor(index))))
        self._join(groups)
        return torch.stack([logits[prompt] for prompt in owners])

    def _passes(self, owners: Owners) -> Iterator[list[tuple[int, ...]]]:
        """Split prompts into forward passes over prompts of equal length."""
        by_length = defaultdict(list)
        for prompt in owners:
            by_length[len(prompt)].append(prompt)
        for length, prompts in by_length.items():
            size = max(1, pass_tokens(self.device) // length)
            yield from (prompts[start : start + size] for start in range(0, len(prompts), size))

    def _join(self, new: list[Group]) -> None:
        """Add groups; those that may decode as one batch are joined if their caches can be."""
        together = defaultdict(list)
        for group in self.groups + new:
            together[0 if self.decoding.is_ragged else group.length].append(group)
        self.groups = [group for groups in together.values() for group in _joined(groups)]

    def decode(self, ids: list[int], positions: list[int]) -> Tensor:
        logits, self.experts = [], {}
        for group in self.groups:
            ids_R1 = self._tensor([ids[row] for row in group.rows])[:, None]
            logits_RV, group.cache = self._run([[row] for row in group.rows], ids_R1, group.lengths, group.cache)
            group.lengths = [length + 1 for length in group.lengths]
            logits.append(logits_RV)
        rows = [row for group in self.groups for row in group.rows]
        return torch.cat(logits)[self._tensor(rows).argsort()]

    def leave(self, gone: list[int], sources: list[int], targets: list[int], length: int) -> None:
        left, moved = set(gone), dict(zip(sources, targets, strict=True))
        for group in self.groups:
            group.leave(left, self.device)
            group.rows = [moved.get(row, row) for row in group.rows]
        self.groups = [group for group in self.groups if group.rows]

    def bytes_per_row(self) -> float:
        """Return the size of a row of the first group. Raise UnusableCache if a tensor does not have its rows first."""
        return bytes_per_row(self.groups[0].cache, len(self.groups[0].rows))

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device)


def _joined(groups: list[Group]) -> list[Group]:
    """Return one group with the rows of all if their caches can be joined, else these groups."""
    if len(groups) == 1:
        return groups
    longest = max(group.length for group in groups)
    caches = [pad_left(group.cache, longest - group.length) for group in groups]
    try:
        cache = join(caches, [len(group.rows) for group in groups])
    except CannotJoin:
        for group in groups:
            pad_left(group.cache, group.length - longest)
        return groups
    return [Group([r for g in groups for r in g.rows], [n for g in groups for n in g.lengths], cache)]
