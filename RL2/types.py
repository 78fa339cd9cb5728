"""The data types of the library. Shape letters: T tokens laid end to end, B sequences, V vocabulary, D hidden size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import save_file
from torch import Tensor

ROUNDING = 2.0**-22
"""Largest total that counts as rounding, relative to the sum of absolute rewards. Rewards such as 0.6 + 0.3 - 0.9 are
not exact, and those of a batch are float32, with a relative error of up to 2^-24 each."""


def summed(rewards: Seq[float]) -> float:
    """Return the sum, rounded once, and exactly 0 where the rewards cancel up to rounding."""
    total, size = math.fsum(rewards), math.fsum(map(abs, rewards))
    return total if abs(total) > ROUNDING * size else 0.0


@dataclass(frozen=True)
class Prompt:
    """One row of a data set, ready for the engine."""

    row: int
    """Row number in the data file, from 0."""
    text: str
    """The first state of the environment."""
    token_ids: list[int]
    """Token ids of `text`."""
    extra_info: dict[str, Any]
    """Data for the environment: answers, tests, tool settings."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template besides the messages: `tools` and its own settings."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The conversation of which `text` is made, where an agent reads it; else empty."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request."""

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
    """The same seed, weights and prompt give the same tokens, whatever else is in the batch."""
    min_p: float = 0.0
    """Smallest share of the probability of the most likely token; 0 keeps all tokens."""


@dataclass(frozen=True)
class Completion:
    """The response of an engine to one request."""

    token_ids: list[int]
    logps: list[float]
    """Log-probability of each token under the distribution it was drawn from; at temperature 0, under the model."""
    finish: Literal["stop", "length"]
    versions: list[int]
    """Version of the weights that sampled each token; weights may change during a response."""
    experts: Tensor | None = None
    """int16 [prompt and response - 1, L, K]: the K experts that each of L routers chose for each token but the last;
    None if they were not recorded."""


@dataclass(init=False, eq=False)
class Sequence:
    """n token ids exactly as they were sent and sampled, with the data that training needs for each, as arrays [n]."""

    token_ids: NDArray[np.int64]
    action_mask: NDArray[np.bool_]
    """True where the token was sampled by the policy."""
    logps: NDArray[np.float32]
    """The engine's log-probability of each sampled token; 0 elsewhere."""
    rewards: NDArray[np.float64]
    """The reward of a turn is at its last sampled token; 0 elsewhere."""
    versions: NDArray[np.int64]
    """Version of the weights that sampled each token; -1 elsewhere. Empty if unknown."""
    experts: Tensor | None = None
    """int16 [n - 1, L, K]: the engine's experts of each token but the last, as in `Completion`."""
    role: str | None = None
    """Role whose tokens are the actions; None in an episode without roles."""

    def __init__(
        self,
        token_ids: ArrayLike = (),
        action_mask: ArrayLike = (),
        logps: ArrayLike = (),
        rewards: ArrayLike = (),
        versions: ArrayLike = (),
        experts: Tensor | None = None,
        role: str | None = None,
    ) -> None:
        """Copy what is given, arrays or lists, into arrays of its own."""
        self.token_ids = np.array(token_ids, np.int64)
        self.action_mask = np.array(action_mask, np.bool_)
        self.logps = np.array(logps, np.float32)
        self.rewards = np.array(rewards, np.float64)
        self.versions = np.array(versions, np.int64)
        self.experts, self.role = experts, role

    def __len__(self) -> int:
        return len(self.token_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return all(np.array_equal(getattr(self, each.name), getattr(other, each.name)) for each in fields(self))


@dataclass(frozen=True)
class Branches:
    """Estimates of the value along a response, from continuations that begin at places of it (credit/branches.py)."""

    places: tuple[int, ...]
    """Number of sampled tokens before each of its M places, rising."""
    values: tuple[float, ...]
    """M + 2 mean rewards: of the prompt's responses, of the continuations of each place, and the response's own."""
    shares: tuple[float, ...]
    """Share that the tokens up to each place, and up to the end, have in the weight of the tree; M + 1 of them."""


@dataclass
class Trajectory:
    """One episode, or the part of one role in it. It has several sequences if the environment rewrote the history.

    In an episode with several roles each sequence belongs to one of them, and the parts of the reward are the rewards
    of the roles. `by_role` in rollout/roles.py splits it.
    """

    row: int
    """Row of its prompt."""
    group: int
    """Position of its prompt in the rollout; all samples of one prompt share it."""
    sample: int
    """Number within its group, from 0."""
    sequences: list[Sequence] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """State, action, state, action, ..., as the environment saw them."""
    score: float = 0.0
    """Sum of the scores of the turns, which evaluation reports."""
    truncated: bool = False
    """The last completion ran into `max_new_tokens` or the length limit."""
    unscored: str | None = None
    """Reason why there is no reward. An unscored trajectory does not train and has no score."""
    parts: dict[str, float] = field(default_factory=dict)
    """Unweighted sum over the turns of each part of the reward, by name; empty if rewards are numbers."""
    plain: float = 0.0
    """Sum of the rewards of turns that returned a number, if other turns returned parts."""
    weighted: float = 0.0
    """`parts` times their weights, and `plain`, summed and rounded once."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the environment by name, each the mean over the turns that returned it."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Metrics that were no numbers in some turn, by name, with their values."""
    unfinished: bool = False
    """The limit of turns ended it before the environment was done."""
    speakers: list[str] = field(default_factory=list)
    """Role of each turn in `texts`; empty in an episode without roles."""
    role: str | None = None
    """Role whose part of an episode this is; None for a whole episode."""
    greedy_reward: float | None = None
    """Reward of a greedy response to the same prompt; None where no estimator of advantages reads it."""
    branches: Branches | None = None
    """Values along it, where `adv.estimator=branch` estimated some."""

    @property
    def reward(self) -> float:
        """Sum of its rewards, exactly 0 where they cancel up to rounding. Above 0, the trajectory is correct.

        With parts it is their weighted sum, because the rewards of turns have been rounded one by one.
        """
        by_token = summed([reward for each in self.sequences for reward in each.rewards[each.rewards != 0].tolist()])
        return self.weighted if self.parts and by_token else by_token

    @property
    def by_part(self) -> dict[str, float]:
        """The parts of its reward; rewards that are numbers are one part without a name."""
        if not self.parts:
            return {"": self.reward}
        return self.parts | ({"": self.plain} if self.plain else {})

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(int(sequence.action_mask.sum()) for sequence in self.sequences)

    @property
    def versions(self) -> Counter[int]:
        """Number of its tokens that each version of the weights sampled."""
        counts = Counter[int]()
        for sequence in self.sequences:
            versions, numbers = np.unique(sequence.versions, return_counts=True)
            counts.update(dict(zip(versions.tolist(), numbers.tolist(), strict=True)))
        del counts[-1]
        return counts


@dataclass(frozen=True)
class SharedPrefix:
    """T positions of which only U are computed: samples of a prompt share its positions exactly."""

    distinct_U: Tensor
    """int64: positions that are computed."""
    place_T: Tensor
    """int64: index among the U of the result of each position."""

    def to(self, device: torch.device | str) -> SharedPrefix:
        """Return a copy on `device`."""
        return SharedPrefix(self.distinct_U.to(device), self.place_T.to(device))


@dataclass(frozen=True)
class TokenBatch:
    """B sequences laid end to end, with all fields aligned.

    Position t has an input token and, as `labels_T[t]`, the token that follows it; every other `_T` field but
    `experts_T` describes that label. A sequence of n tokens takes n - 1 positions. Positions whose label was sampled
    are the *actions*.
    """

    token_ids_T: Tensor
    labels_T: Tensor
    position_ids_T: Tensor
    action_T: Tensor
    """bool: the label was sampled by the policy (in SFT: it is trained on)."""
    reward_T: Tensor
    cu_seqlens: Tensor
    """int64 [B + 1]: sequence b takes positions cu_seqlens[b] to cu_seqlens[b + 1]."""
    trajectory_B: Tensor
    """int64: number of the trajectory that the sequence belongs to."""
    group_B: Tensor
    """int64: number of the prompt group; each role of an episode has a group of its own."""
    teacher_B: Tensor | None = None
    """int64: number of the sequence's teacher; None unless there are several."""
    truncated_B: Tensor | None = None
    """bool: its trajectory ran into a length limit; None if none did."""
    role_B: Tensor | None = None
    """int64: number of the role, in order of names; None if trajectories have none."""
    engine_logp_T: Tensor | None = None
    age_T: Tensor | None = None
    """int64: staleness of the label, in versions of the weights; None if all are 0."""
    old_logp_T: Tensor | None = None
    """Log-probability under the old policy, before the updates on this rollout."""
    old_entropy_T: Tensor | None = None
    """Entropy under the old policy."""
    old_sum_p2_T: Tensor | None = None
    """Sum of the squared probabilities of all tokens under the old policy."""
    off_mode_T: Tensor | None = None
    """bool: the label was not the most likely token under the old policy."""
    ref_logp_T: Tensor | None = None
    value_T: Tensor | None = None
    """The critic's estimate, before an action, of the rewards to come; undefined elsewhere."""
    before_T: Tensor | None = None
    """Estimated value of the last place before an action, 0 elsewhere (credit/branches.py); None without branches."""
    after_T: Tensor | None = None
    """Estimated value of the next place behind an action, 0 elsewhere."""
    share_T: Tensor | None = None
    """Share of an action in the weight of its tree of responses, which is 1 at each depth; None stands for 1."""
    return_T: Tensor | None = None
    """Target of the critic at an action: its advantage before whitening plus `value_T`."""
    advantage_T: Tensor | None = None
    weight_T: Tensor | None = None
    objective_factor_T: Tensor | None = None
    """Factor of the objective, but not of the KL divergence or the entropy; None stands for 1."""
    observation_weight_T: Tensor | None = None
    """Weight of the cross-entropy on a label that is an observation, 0 elsewhere; None if no observation trains."""
    nll_factor_T: Tensor | None = None
    """Preferences: number of chosen responses over their number of actions, at these actions; 0 elsewhere. It turns the
    sum of a response into its part of a mean over all tokens of the step; None: the mean over each response."""
    baseline_T: Tensor | None = None
    """Preferences without pairs: the point from which h, the sum of log p - log p_ref over a response, counts as good.
    The same at all positions; None stands for 0."""
    covariance_rank_T: Tensor | None = None
    """Share of the tokens of the minibatch with a higher covariance of advantage and log-probability."""
    imitation_weight_T: Tensor | None = None
    """Weight of the cross-entropy on an action of a correct trajectory, 0 elsewhere; None if there is no such term."""
    experts_T: Tensor | None = None
    """int16 [T, L, K]: recorded experts of the input token, K of each of L routers; None if there are none."""
    told: TokenBatch | None = None
    """The same sequences after prompts with hints, which a teacher reads in their place; it has as many actions."""

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.cu_seqlens) - 1

    @property
    def largest_token_id(self) -> int:
        """Largest id among inputs and labels; the last token of a sequence is only a label."""
        ids = torch.cat([self.token_ids_T, self.labels_T])
        return int(ids.max()) if len(ids) else -1

    @property
    def lengths_B(self) -> Tensor:
        """int64: positions of each sequence."""
        return self.cu_seqlens.diff()

    @property
    def sequence_T(self) -> Tensor:
        """int64: index of the sequence that each position belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_sequences, device=self.cu_seqlens.device), self.lengths_B)

    def with_(self, **changes: Any) -> TokenBatch:
        """Return a copy with other fields: tensors, or a batch as `told`."""
        return replace(self, **changes)

    def shared(self) -> SharedPrefix | None:
        """Return the positions that sequences of a group share because they begin alike, or None if none do.

        Every sequence is compared with the first of its group, so groups should stay together. Tokens with other
        recorded experts are not alike.
        """
        starts, lengths = self.cu_seqlens.tolist(), self.lengths_B.tolist()
        source_T = torch.arange(len(self.token_ids_T))
        first: dict[int, int] = {}
        for b, group in enumerate(self.group_B.tolist()):
            a = first.setdefault(group, b)
            length = min(lengths[a], lengths[b])
            mine, its = (slice(starts[i], starts[i] + length) for i in (b, a))
            alike_T = self.token_ids_T[mine] == self.token_ids_T[its]
            if self.experts_T is not None:
                alike_T &= (self.experts_T[mine] == self.experts_T[its]).flatten(1).all(1)
            alike = int(alike_T.long().cumprod(0).sum())
            source_T[starts[b] : starts[b] + alike] = source_T[starts[a] : starts[a] + alike]
        is_own_T = source_T == torch.arange(len(source_T))
        if bool(is_own_T.all()):
            return None
        return SharedPrefix(distinct_U=is_own_T.nonzero()[:, 0], place_T=(is_own_T.cumsum(0) - 1)[source_T])

    def to(self, device: torch.device | str) -> TokenBatch:
        """Return a copy on `device`."""
        told = self.told and self.told.to(device)
        return replace(self, **{name: x.to(device) for name, x in self.tensors().items()}, told=told)

    def save(self, file: Path) -> None:
        """Write the batch without `told` as safetensors; `TokenBatch(**load_file(file))` restores it."""
        save_file({name: x.contiguous() for name, x in self.tensors().items()}, file)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    def positions(self, keep_T: Tensor) -> TokenBatch:
        """Return the batch at the positions where `keep_T` is true; objectives get that of the actions."""
        counts_B = torch.zeros_like(self.lengths_B).index_add_(0, self.sequence_T, keep_T.long())
        index = keep_T.nonzero()[:, 0]
        kept = {name: x.index_select(0, index) for name, x in self.tensors().items() if name.endswith("_T")}
        return replace(self, **kept, cu_seqlens=_starts(counts_B), told=None)

    def sequences(self, ids: Seq[int]) -> TokenBatch:
        """Return a batch of the sequences `ids`, in that order."""
        chosen = torch.as_tensor(ids, dtype=torch.long, device=self.cu_seqlens.device)
        lengths_B = self.lengths_B[chosen]
        cu_seqlens = _starts(lengths_B)
        offset_T = torch.repeat_interleave(self.cu_seqlens[chosen] - cu_seqlens[:-1], lengths_B)
        index = torch.arange(int(cu_seqlens[-1]), device=offset_T.device) + offset_T
        kept = {name: x.index_select(0, index) for name, x in self.tensors().items() if name.endswith("_T")}
        kept |= {name: x[chosen] for name, x in self.tensors().items() if name.endswith("_B")}
        return replace(self, **kept, cu_seqlens=cu_seqlens, told=self.told and self.told.sequences(ids))


def _starts(lengths_B: Tensor) -> Tensor:
    return torch.cat([lengths_B.new_zeros(1), lengths_B.cumsum(0)])


class TokenStats:
    """Statistics of the next-token distribution p = softmax(logits / temperature) at each position, float32 [T].

    a is the label (the sampled token), m the most likely token. Only requested fields exist; the error for another
    field says how to request it.

    Those from `teacher_logp` on need a teacher, with the distribution q and a temperature of its own. In fields that
    compare both, p and q are the distributions over the tokens that both models have.
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
    """Rank of a among all tokens by falling probability, 1 = m; ties by rising id. No gradient."""
    top_logp: Tensor
    """[T, K]: log-probabilities of the K most likely tokens, in the order of `rank`."""
    top_id: Tensor
    """int64 [T, K]: their ids. No gradient."""
    sum_p2: Tensor
    """sum_i p_i^2, the probability that two samples are the same token"""
    teacher_logp: Tensor
    """log q_a"""
    teacher_max_logp: Tensor
    """log q of the teacher's most likely token"""
    teacher_entropy: Tensor
    """-sum_i q_i log q_i, in nats"""
    teacher_rank: Tensor
    """Rank of a among all tokens of the teacher, as `rank`. No gradient."""
    kl_teacher_student: Tensor
    """KL(q || p) = sum_i q_i log(q_i / p_i)"""
    kl_student_teacher: Tensor
    """KL(p || q) = sum_i p_i log(p_i / q_i)"""
    jsd: Tensor
    """beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p"""
    cross_entropy: Tensor
    """-sum_i q_i log p_i"""
    teacher_top_id: Tensor
    """int64 [T, K]: the teacher's K most likely tokens, ties by rising id. No gradient."""
    teacher_top_logp: Tensor
    """[T, K]: log q of the tokens in `teacher_top_id`"""
    teacher_tail_logp: Tensor
    """log of the sum of q over all other tokens"""
    student_top_logp: Tensor
    """[T, K]: log p of the tokens in `teacher_top_id`"""
    student_tail_logp: Tensor
    """log of the sum of p over all other tokens"""
    top_kl_teacher_student: Tensor
    """KL(q || p) over the tokens in `teacher_top_id` and one bucket of all others"""
    top_kl_student_teacher: Tensor
    """KL(p || q) over the tokens in `teacher_top_id` and one bucket of all others"""
    overlap_k: Tensor
    """Share of `teacher_top_id` that is in `top_id`. No gradient."""

    def __init__(self, **fields: Tensor) -> None:
        self.__dict__.update(fields)

    def map(self, function: Callable[[Tensor], Tensor]) -> TokenStats:
        """Return the statistics with `function` applied to each tensor."""
        return TokenStats(**{name: function(x) for name, x in vars(self).items()})

    def at(self, keep_T: Tensor) -> TokenStats:
        """Return the statistics at the positions where `keep_T` is true."""
        return self.map(lambda x: x[keep_T])

    def __getattr__(self, name: str) -> Tensor:  # only called for fields that __init__ did not set
        if name in MENU or name in TEACHER_MENU:
            raise AttributeError(f"the statistic {name!r} was not requested; declare it with @needs({name!r})")
        raise AttributeError(name)


@dataclass(frozen=True)
class StatsRequest:
    """Token statistics to compute."""

    fields: tuple[str, ...]
    top_k: int = 0
    """K of the fields in `TOP`."""
    temperature: float = 1.0
    """Divides the logits."""
    budget_mib: float | None = None
    """MiB of logits in memory at a time; None takes a good size for the device."""
    beta: float = 0.5
    """beta of `jsd`, between 0 and 1: the teacher's share of the mixture."""

    @property
    def needs_teacher(self) -> bool:
        """True if a field is a statistic of a teacher."""
        return bool(set(TEACHER_MENU) & set(self.fields))


_ALL = tuple(TokenStats.__annotations__)

MENU: tuple[str, ...] = _ALL[: _ALL.index("teacher_logp")]
"""Every statistic of one distribution that an objective may read."""

TEACHER_MENU: tuple[str, ...] = _ALL[len(MENU) :]
"""Every statistic that also needs a teacher."""

TOP: tuple[str, ...] = ("top_logp", "top_id", *TEACHER_MENU[TEACHER_MENU.index("teacher_top_id") :])
"""The statistics of the K most likely tokens."""
