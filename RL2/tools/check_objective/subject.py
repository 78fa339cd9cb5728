"""The subject of the checks: an objective, its knob settings, and the batches that it is evaluated on.

Shape letters: T tokens, B sequences, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from RL2.objectives.objective import Loss, Objective
from RL2.objectives.registry import find
from RL2.ops.teacher_stats import Teacher, reference_teacher_stats, teacher_stats
from RL2.ops.token_stats import reference_stats, token_stats
from RL2.tools.checking import Setting, Tried
from RL2.types import MENU, TEACHER_MENU, TOP, TokenBatch, TokenStats

TrainsOn = Literal["rollout", "pairs", "labels"]
LENGTHS = (5, 1, 0, 8, 3, 7)
"""Actions of each sequence, among them a single one and none at all."""


@dataclass(frozen=True)
class SyntheticBatch:
    """A batch of actions, with the hidden states and heads that its statistics are computed from."""

    hidden_TD: Tensor
    head_VD: Tensor
    batch: TokenBatch
    teacher_TD: Tensor
    """Hidden states of a teacher, which objectives may read statistics of; its head is the student's."""

    @property
    def logits_TV(self) -> Tensor:
        """The logits of each token."""
        return self.hidden_TD @ self.head_VD.T

    @property
    def teacher_TV(self) -> Tensor:
        """The logits of the teacher."""
        return self.teacher_TD @ self.head_VD.T

    def sequences(self, ids: Sequence[int]) -> SyntheticBatch:
        """Return the batch with the sequences `ids`, in that order."""
        place_T = self.batch.with_(token_ids_T=torch.arange(len(self.hidden_TD))).sequences(ids).token_ids_T
        hidden_TD, teacher_TD = self.hidden_TD[place_T], self.teacher_TD[place_T]
        return replace(self, hidden_TD=hidden_TD, teacher_TD=teacher_TD, batch=self.batch.sequences(ids))

    def fresh(self) -> SyntheticBatch:
        """Return the batch as on the first update of a rollout without a reference: some fields are None."""
        names = ("old_logp_T", "ref_logp_T", "value_T", "covariance_rank_T", "nll_factor_T", "baseline_T")
        missing: dict[str, Any] = dict.fromkeys(names)
        return replace(self, batch=replace(self.batch, **missing))

    def single(self) -> SyntheticBatch:
        """Return the batch in float32."""
        floats = {name: x.float() for name, x in self.batch.tensors().items() if x.is_floating_point()}
        batch = self.batch.with_(**floats)
        return SyntheticBatch(self.hidden_TD.float(), self.head_VD.float(), batch, self.teacher_TD.float())

    def units(self, trains_on: TrainsOn) -> list[list[int]]:
        """Return the sequences that a loss may couple: those of each pair, or each alone."""
        group, alone = self.batch.group_B.tolist(), range(self.batch.num_sequences)
        if trains_on != "pairs":
            return [[b] for b in alone]
        return [[b for b in alone if group[b] == g] for g in dict.fromkeys(group)]

    def preferences(self) -> SyntheticBatch:
        """Return the batch with good and bad responses, the two of a group, among them one without actions."""
        batch, number = self.batch, self.batch.num_sequences
        good_B = (torch.arange(number) % 4).remainder(3) == 0  # in groups of two: good and bad, bad and good, ...
        good_T = good_B[batch.sequence_T].double()
        batch = batch.with_(
            reward_T=batch.reward_T * good_T,
            nll_factor_T=(0.3 * good_T).to(batch.reward_T),
            baseline_T=torch.full_like(batch.reward_T, 0.4),
        )
        return replace(self, batch=batch)


def synthetic_batch(vocabulary: int) -> SyntheticBatch:
    """Return a batch in float64, the same at every call.

    Distributions are flat and peaked, labels range from the mode to the rarest token, advantages have both signs, and
    the log-probabilities of old policy, reference and engine differ from the present ones.
    """
    g = torch.Generator().manual_seed(0)
    num_tokens = sum(LENGTHS)
    hidden_TD = torch.randn(num_tokens, 8, generator=g, dtype=torch.float64)
    hidden_TD *= torch.linspace(0.3, 1.5, num_tokens)[torch.randperm(num_tokens, generator=g), None]
    head_VD = torch.randn(vocabulary, 8, generator=g, dtype=torch.float64)
    ranks = (1, 2, 1, 3, vocabulary, 1, 2, vocabulary // 4, 1, vocabulary // 2, 5)
    order_TV = (hidden_TD @ head_VD.T).argsort(dim=-1, descending=True)
    labels_T = torch.stack([order_V[ranks[t % len(ranks)] - 1] for t, order_V in enumerate(order_TV)])
    batch = _batch(labels_T, LENGTHS)
    logp_T = reference_stats(hidden_TD @ head_VD.T, labels_T, ("logp",)).logp

    def near(scale: float) -> Tensor:
        noise_T = scale * torch.randn(num_tokens, generator=g, dtype=torch.float64)
        noise_T[-4:] = (
            3.7 * scale * torch.tensor([-1, -1, 1, 1])
        )  # far in both directions, for advantages of either sign
        return (logp_T + noise_T).clamp(max=-1e-3)

    sign_T = 1 - 2 * (torch.arange(num_tokens) % 2)
    batch = batch.with_(
        old_logp_T=near(0.6),
        ref_logp_T=near(0.3),
        engine_logp_T=near(0.05),
        value_T=torch.randn(num_tokens, generator=g, dtype=torch.float64),
        advantage_T=sign_T * (0.2 + torch.rand(num_tokens, generator=g, dtype=torch.float64)),
        covariance_rank_T=torch.logspace(-5, -0.1, num_tokens, dtype=torch.float64),  # for small and large shares
    )
    teacher_TD = hidden_TD + 0.4 * torch.randn(hidden_TD.shape, generator=g, dtype=torch.float64)
    return SyntheticBatch(hidden_TD, head_VD, batch, teacher_TD)


def extremes(vocabulary: int) -> tuple[SyntheticBatch, list[str]]:
    """Return a batch with tied, certain and impossible tokens, and a description of the distribution of each token."""
    rows: list[tuple[str, Tensor, int]] = []
    for name, gap in (("1e-12", 27.7), ("1e-30", 69.1), ("1e-80", 184.3)):
        peaked = torch.zeros(vocabulary)
        peaked[3] = gap + torch.tensor(vocabulary - 1.0).log()
        rare = torch.linspace(0, 1, vocabulary)
        rare[3] = -gap
        rows += [(f"p = 1 - {name}", peaked, 3), (f"p near {name}, the mode certain", peaked, 5)]
        rows += [(f"p near {name}, the others alike", rare, 3)]
    tied, equal = torch.zeros(vocabulary), torch.zeros(vocabulary)
    tied[2] = tied[4] = 5.0
    rows += [("two modes tied", tied, label) for label in (2, 4)]
    rows += [("all tokens equal", equal, label) for label in (0, vocabulary - 1)]
    rows = [row for row in rows for _ in range(2)]  # each with an advantage of either sign
    labels_T = torch.tensor([label for _, _, label in rows])
    logits_TV = torch.stack([logits for _, logits, _ in rows])
    logp_T = reference_stats(logits_TV.double(), labels_T, ("logp",)).logp.float()
    sign_T = 1.0 - 2 * (torch.arange(len(rows)) % 2)
    batch = _batch(labels_T, [2] * (len(rows) // 2)).with_(
        old_logp_T=logp_T - 0.3 * sign_T.roll(1),
        ref_logp_T=logp_T - 0.2,
        engine_logp_T=logp_T + 0.0,
        value_T=torch.zeros(len(rows)),
        advantage_T=sign_T,
    )
    # the teacher is certain where the student is not, and the other way round
    return SyntheticBatch(logits_TV, torch.eye(vocabulary), batch, logits_TV.roll(4, 0)), [name for name, _, _ in rows]


def label_by_label(on: SyntheticBatch, teacher_TD: Tensor) -> SyntheticBatch:
    """Return a batch of T x V sequences of one action: each token of `on` with each token of the vocabulary as label.

    It is on-policy, without advantages, and `teacher_TD` are the hidden states of its teacher.
    """
    (num_tokens, _), vocabulary = on.hidden_TD.shape, len(on.head_VD)
    labels_N = torch.arange(vocabulary).repeat(num_tokens)
    hidden_ND, teacher_ND = (x.repeat_interleave(vocabulary, 0) for x in (on.hidden_TD, teacher_TD))
    logp_N = on.logits_TV.log_softmax(-1).flatten()
    batch = _batch(labels_N, [1] * len(labels_N)).with_(engine_logp_T=logp_N, advantage_T=torch.zeros_like(logp_N))
    return SyntheticBatch(hidden_ND, on.head_VD, batch, teacher_ND)


def _batch(labels_T: Tensor, lengths: Sequence[int]) -> TokenBatch:
    length_B = torch.tensor(lengths)
    number_B, ends_B = torch.arange(len(lengths)), length_B.cumsum(0)
    position_T = torch.cat([torch.arange(length) for length in lengths])
    return TokenBatch(
        token_ids_T=labels_T.roll(1),
        labels_T=labels_T,
        position_ids_T=position_T,
        action_T=torch.ones_like(labels_T, dtype=torch.bool),
        reward_T=torch.zeros(len(labels_T), dtype=torch.float64).index_fill(0, ends_B[length_B > 0] - 1, 1.0),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), ends_B]),
        trajectory_B=number_B,
        group_B=number_B // 2,
    )


@dataclass(frozen=True)
class Subject(Tried):
    """An objective with the settings of its knobs that it is tried at."""

    source: str | Objective
    """The name or the object by which another process finds it."""
    given: Setting
    """Knobs that are not at their defaults."""

    @cached_property
    def function(self) -> Objective:
        """The objective."""
        return find(self.source) if isinstance(self.source, str) else self.source

    @property
    def declared(self) -> Objective:
        """The objective."""
        return self.function

    def whole(self, vocabulary: int | None = None) -> SyntheticBatch:
        """Return a new batch of the data that it trains on, with `vocabulary` tokens, by default its own number."""
        batch = synthetic_batch(vocabulary or self.vocabulary)
        return batch if self.function.trains_on == "rollout" else batch.preferences()

    @cached_property
    def read(self) -> set[str]:
        """Statistics that it has read so far."""
        return set()

    @cached_property
    def settings(self) -> list[Setting]:
        """The base setting, and each that differs from it in one knob and that the objective accepts."""
        base, *one_changed = super().settings
        return [base, *(setting for setting in one_changed if not self._refuses(setting))]

    def _refuses(self, setting: Setting) -> bool:
        """Return whether the objective raises ValueError, which says that values do not go together."""
        whole = self.whole()
        try:
            self.dense(setting, whole.logits_TV, whole)
        except ValueError:
            return True
        except Exception:
            return False
        return False

    def top_k(self, setting: Setting) -> int:
        """Return K of the statistics of the most likely tokens at this setting."""
        knob = self.function.top_k
        return 4 if knob is None else setting[knob]

    def beta(self, setting: Setting) -> float:
        """Return beta of `jsd` at this setting."""
        return 0.5 if self.function.beta is None else setting[self.function.beta]

    @cached_property
    def vocabulary(self) -> int:
        """Size of a vocabulary that has room for K at every setting."""
        knob = self.function.top_k
        largest = 0 if knob is None else max([self.base[knob], *self.alternatives[knob]])
        return max(16, largest + 8)

    def dense(self, setting: Setting, logits_TV: Tensor, on: SyntheticBatch) -> Loss:
        """Return the loss at these logits on the dense reference path, in their dtype, and record what is read."""
        labels_T, top_k = on.batch.labels_T, self.top_k(setting)
        if self.function.needs_teacher:
            menu, teacher_TV = (*MENU, *TEACHER_MENU), on.teacher_TV.detach()
            stats = reference_teacher_stats(logits_TV, teacher_TV, labels_T, menu, top_k, self.beta(setting))
        else:
            stats = reference_stats(logits_TV, labels_T, MENU, top_k)
        return self.function(_Watched(self.read, stats), on.batch, **setting)

    def chunked(self, setting: Setting, hidden_TD: Tensor, head_VD: Tensor, on: SyntheticBatch) -> Loss:
        """Return the loss on the chunked path, as in training, with the statistics in `read`."""
        top_k = self.top_k(setting) if set(TOP) & self.read else 0
        how: dict[str, Any] = {"fields": tuple(self.read), "top_k": top_k, "implementation": "chunked"}
        if self.function.needs_teacher:
            teacher = Teacher(on.teacher_TD, on.head_VD)
            how["beta"] = self.beta(setting)
            stats = teacher_stats(hidden_TD, head_VD, on.batch.labels_T, teacher, **how)
        else:
            stats = token_stats(hidden_TD, head_VD, on.batch.labels_T, **how)
        return self.function(stats, on.batch, **setting)

    def sums(self, setting: Setting, on: SyntheticBatch) -> dict[str, Tensor]:
        """Return what training sums over microbatches and processes: loss, gradients and metrics."""
        hidden_TD, head_VD = on.hidden_TD.clone().requires_grad_(), on.head_VD.clone().requires_grad_()
        loss_T, metrics = self.chunked(setting, hidden_TD, head_VD, on)
        hidden, head = gradient(loss_T, torch.ones_like(loss_T), hidden_TD, head_VD)
        sums = {"loss": loss_T.sum(), "gradient of the hidden states": hidden.sum(0), "gradient of the head": head}
        return {name: x.detach() for name, x in sums.items()} | {
            n: x.detach().double().sum() for n, x in metrics.items()
        }


def gradient(loss_T: Tensor, weight_T: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Return the gradient of (loss_T * weight_T).sum(), as in training."""
    grads = torch.autograd.grad((loss_T * weight_T).sum(), leaves, allow_unused=True)
    return tuple(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True))


class _Watched(TokenStats):
    """Token statistics that record which of them are read."""

    def __init__(self, read: set[str], stats: TokenStats) -> None:
        super().__init__(**vars(stats))
        self.__dict__["_read"] = read

    def __getattribute__(self, name: str) -> Any:
        if name in MENU or name in TEACHER_MENU:
            object.__getattribute__(self, "_read").add(name)
        return object.__getattribute__(self, name)


class Constants(TorchFunctionMode):
    """Results of `.detach()`: recorded in the first evaluation, and repeated in the same order in later ones.

    So finite differences use the same constants as autograd. `torch.no_grad()` is not recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.again: Iterator[Tensor] | None = None

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.again = iter(self.kept)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.detach, torch.detach):
            return func(*args, **(kwargs or {}))
        value = func(*args, **(kwargs or {}))
        if self.again is not None:
            return next(self.again, value).clone()
        self.kept.append(value.clone())
        return value
