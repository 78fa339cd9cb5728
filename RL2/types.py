"""The nouns of the library. Shape letters: T tokens laid end to end, B sequences, V vocabulary, D hidden size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

ROUNDING = 2.0**-22
"""Part of the rewards' sum of absolute values up to which a total is rounding: rewards such as 0.6 + 0.3 - 0.9 are not
exact, and those of a batch are float32, with a relative error of up to 2^-24 each."""


def summed(rewards: Seq[float]) -> float:
    """Return the sum, rounded once, and exactly 0 where the rewards cancel but for rounding."""
    total, size = math.fsum(rewards), math.fsum(map(abs, rewards))
    return total if abs(total) > ROUNDING * size else 0.0


@dataclass(frozen=True)
class Prompt:
    """One row of a data set, ready for the engine."""

    row: int
    """Row number in the data file, from 0."""
    text: str
    """What the environment sees as its first state."""
    token_ids: list[int]
    """`text`, encoded once."""
    extra_info: dict[str, Any]
    """Handed to the environment: answers, tests, tool settings."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template beside the messages: `tools` and settings of its own."""


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    stop: tuple[str, ...] = ()
    """The request ends with the token that completes one of these strings; the token is kept."""
    stop_token_ids: tuple[int, ...] = ()
    """The request ends with one of these tokens; the token is kept."""
    seed: int = 0
    """Same seed, same weights, same prompt: same tokens, whatever else is in the batch."""


@dataclass(frozen=True)
class Completion:
    """What an engine gives back for one request."""

    token_ids: list[int]
    logps: list[float]
    """Log-probability of each token under the distribution it was drawn from; at temperature 0, under the model."""
    finish: Literal["stop", "length"]
    versions: list[int]
    """Version of the weights that sampled each token; they may change under way."""


@dataclass
class Sequence:
    """Token ids exactly as they were sent and sampled, with what training needs about each."""

    token_ids: list[int]
    action_mask: list[bool]
    """True where the token was sampled by the policy."""
    logps: list[float]
    """The engine's log-probability of each sampled token; 0 elsewhere."""
    rewards: list[float]
    """The reward of a turn stands at the turn's last sampled token; 0 elsewhere."""
    versions: list[int] = field(default_factory=list)
    """Version of the weights that sampled each token; -1 elsewhere. Empty: not known."""


@dataclass
class Trajectory:
    """One episode. Several sequences when the environment rewrote the history."""

    row: int
    """Row of its prompt."""
    group: int
    """Position of its prompt in the rollout; all samples of one prompt share it."""
    sample: int
    """Number within its group, from 0."""
    sequences: list[Sequence] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """State, action, state, action, ...: what the environment saw."""
    score: float = 0.0
    """Sum of the turns' scores; what evaluation reports."""
    truncated: bool = False
    """The last completion ran into `max_new_tokens` or the length limit."""
    unscored: str | None = None
    """Why there is no reward. An unscored trajectory does not train and has no score."""
    parts: dict[str, float] = field(default_factory=dict)
    """Part of the reward -> its sum over the turns, not weighted; empty where rewards are numbers."""
    plain: float = 0.0
    """Sum of the rewards of those turns that returned a number, where others returned parts."""
    weighted: float = 0.0
    """`parts` times their weights, and `plain`, summed and rounded once."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the environment measured: of each, the mean over the turns that gave it."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Metric that was no number in some turn -> what it was."""

    @property
    def reward(self) -> float:
        """Sum of its rewards, exactly 0 where they cancel but for rounding. Above 0: the trajectory is correct.

        With parts it is the sum of these, each times its weight; rewards of turns have been rounded on their own.
        """
        by_token = summed(list(chain.from_iterable(sequence.rewards for sequence in self.sequences)))
        return self.weighted if self.parts and by_token else by_token

    @property
    def by_part(self) -> dict[str, float]:
        """Return `parts`, with the rewards that are numbers as one part without a name."""
        if not self.parts:
            return {"": self.reward}
        return self.parts | ({"": self.plain} if self.plain else {})

    @property
    def num_tokens(self) -> int:
        """Sampled tokens."""
        return sum(sum(sequence.action_mask) for sequence in self.sequences)

    @property
    def versions(self) -> Counter[int]:
        """Version of the weights -> how many of its tokens they sampled."""
        counts = Counter(chain.from_iterable(sequence.versions for sequence in self.sequences))
        del counts[-1]
        return counts


@dataclass(frozen=True)
class SharedPrefix:
    """T positions of which only U are different computations: samples of a prompt share its positions, exactly."""

    distinct_U: Tensor
    """int64: the positions that are computed."""
    place_T: Tensor
    """int64: where among the U each position finds its result."""

    def to(self, device: torch.device | str) -> SharedPrefix:
        return SharedPrefix(self.distinct_U.to(device), self.place_T.to(device))


@dataclass(frozen=True)
class TokenBatch:
    """B sequences laid end to end in one layout, aligned once.

    Position t holds an input token and, as `labels_T[t]`, the token that follows it; every other `_T` field speaks of
    that label. A sequence of n tokens takes n - 1 positions. Positions whose label was sampled are the *actions*.
    """

    token_ids_T: Tensor
    labels_T: Tensor
    position_ids_T: Tensor
    action_T: Tensor
    """bool: the label was sampled by the policy (in SFT: is trained on)."""
    reward_T: Tensor
    cu_seqlens: Tensor
    """int64 [B + 1]: sequence b takes positions cu_seqlens[b] to cu_seqlens[b + 1]."""
    trajectory_B: Tensor
    """int64: number of the trajectory that the sequence belongs to."""
    group_B: Tensor
    """int64: number of the prompt group."""
    truncated_B: Tensor | None = None
    """bool: its trajectory ran into a length limit; absent: none did."""
    engine_logp_T: Tensor | None = None
    age_T: Tensor | None = None
    """int64: by how many versions the weights that sampled the label were older than the present ones. Not there: 0."""
    old_logp_T: Tensor | None = None
    """The policy's own log-probability when the rollout arrived."""
    old_entropy_T: Tensor | None = None
    """Its entropy then."""
    off_mode_T: Tensor | None = None
    """bool: the label was not its most likely token then."""
    ref_logp_T: Tensor | None = None
    value_T: Tensor | None = None
    """The critic's estimate, before an action, of the rewards to come; elsewhere it means nothing."""
    return_T: Tensor | None = None
    """What the critic shall predict at an action: its advantage plus `value_T`."""
    advantage_T: Tensor | None = None
    weight_T: Tensor | None = None
    objective_factor_T: Tensor | None = None
    """Factor of the objective, but not of the KL divergence or the entropy; absent: 1."""

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def largest_token_id(self) -> int:
        """Largest id among inputs and labels: the last token of a sequence is only a label."""
        ids = torch.cat([self.token_ids_T, self.labels_T])
        return int(ids.max()) if len(ids) else -1

    @property
    def lengths_B(self) -> Tensor:
        return self.cu_seqlens.diff()

    @property
    def sequence_T(self) -> Tensor:
        """int64: which of the B sequences a position belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_sequences, device=self.cu_seqlens.device), self.lengths_B)

    def with_(self, **changes: Tensor) -> TokenBatch:
        return replace(self, **changes)

    def shared(self) -> SharedPrefix | None:
        """Which positions are the same computation, because sequences of a group begin alike; None if none do.

        Every sequence is compared with the first of its group, so it is worth keeping groups together.
        """
        starts, lengths = self.cu_seqlens.tolist(), self.lengths_B.tolist()
        source_T = torch.arange(len(self.token_ids_T))
        first: dict[int, int] = {}
        for b, group in enumerate(self.group_B.tolist()):
            a = first.setdefault(group, b)
            length = min(lengths[a], lengths[b])
            mine, its = (self.token_ids_T[starts[i] : starts[i] + length] for i in (b, a))
            alike = int((mine == its).long().cumprod(0).sum())
            source_T[starts[b] : starts[b] + alike] = source_T[starts[a] : starts[a] + alike]
        is_own_T = source_T == torch.arange(len(source_T))
        if bool(is_own_T.all()):
            return None
        return SharedPrefix(distinct_U=is_own_T.nonzero()[:, 0], place_T=(is_own_T.cumsum(0) - 1)[source_T])

    def to(self, device: torch.device | str) -> TokenBatch:
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()})

    def save(self, file: Path) -> None:
        """As safetensors; TokenBatch(**load_file(file)) is it again."""
        save_file({name: x.contiguous() for name, x in self.tensors().items()}, file)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}

    def positions(self, keep_T: Tensor) -> TokenBatch:
        """The same sequences, only at the positions where `keep_T`: what an objective sees."""
        counts_B = torch.zeros_like(self.lengths_B).index_add_(0, self.sequence_T, keep_T.long())
        index = keep_T.nonzero()[:, 0]
        kept = {name: x.index_select(0, index) for name, x in self.tensors().items() if name.endswith("_T")}
        return replace(self, **kept, cu_seqlens=_starts(counts_B))

    def sequences(self, ids: Seq[int]) -> TokenBatch:
        """The sequences `ids`, in that order."""
        chosen = torch.as_tensor(ids, dtype=torch.long, device=self.cu_seqlens.device)
        lengths_B = self.lengths_B[chosen]
        cu_seqlens = _starts(lengths_B)
        offset_T = torch.repeat_interleave(self.cu_seqlens[chosen] - cu_seqlens[:-1], lengths_B)
        index = torch.arange(int(cu_seqlens[-1]), device=offset_T.device) + offset_T
        kept = {name: x.index_select(0, index) for name, x in self.tensors().items() if name.endswith("_T")}
        kept |= {name: x[chosen] for name, x in self.tensors().items() if name.endswith("_B")}
        return replace(self, **kept, cu_seqlens=cu_seqlens)


def _starts(lengths_B: Tensor) -> Tensor:
    return torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])


class TokenStats:
    """Statistics of the next-token distribution p = softmax(logits / temperature) at each position, float32 [T].

    a is the label (the sampled token), m the most likely token. Only the fields that were asked for are there; reading
    another one is an error that says how to ask.
    """

    logp: Tensor
    """log p_a"""
    log1mp: Tensor
    """log(1 - p_a)"""
    max_logp: Tensor
    """log p_m"""
    max_log1mp: Tensor
    """log(1 - p_m)"""
    entropy: Tensor
    """-sum_i p_i log p_i, in nats"""
    rank: Tensor
    """Place of a among all tokens by falling probability, 1 = m; equals by rising id. No gradient."""
    top_logp: Tensor
    """[T, K]: log-probabilities of the K most likely tokens, in the order of `rank`."""
    top_id: Tensor
    """int64 [T, K]: their ids. No gradient."""
    sum_p2: Tensor
    """sum_i p_i^2, the chance that two samples are the same token"""

    def __init__(self, **fields: Tensor) -> None:
        self.__dict__.update(fields)

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStats:
        """Return the statistics with `function` applied to each tensor."""
        return TokenStats(**{name: function(x) for name, x in vars(self).items()})

    def at(self, keep_T: Tensor) -> TokenStats:
        """Return the statistics at the positions where `keep_T` is true."""
        return self.map(lambda x: x[keep_T])

    def __getattr__(self, name: str) -> Tensor:  # only called for what __init__ did not set
        if name in MENU:
            raise AttributeError(f"the statistic {name!r} was not asked for; declare it with @needs({name!r})")
        raise AttributeError(name)


@dataclass(frozen=True)
class StatsRequest:
    """Which token statistics are wanted."""

    fields: tuple[str, ...]
    top_k: int = 0
    """K of `top_logp` and `top_id`."""
    temperature: float = 1.0
    """Divides the logits."""
    budget_mib: float | None = None
    """Logits in memory at a time; None: a good size for the device."""


MENU: tuple[str, ...] = tuple(TokenStats.__annotations__)
"""Every statistic that an objective may ask for."""
