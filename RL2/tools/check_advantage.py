"""Check an advantage estimator: `rl2 check-advantage mine.py:function`; in a test, `assert_sound("mine.py:function")`.

Each check runs at the default knobs and with one knob changed at a time, on the small rollouts of `cases`. Shape
letters: T positions, B sequences, N trajectories, P parts of the reward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from RL2.batch import registry
from RL2.batch.estimator import READABLE, Estimator
from RL2.batch.packing import pack
from RL2.errors import ConfigError
from RL2.tools.checking import Finding, Setting, Tried, Unsound, assert_passed, check_effects, check_knobs, raises
from RL2.types import Sequence as TokenSequence
from RL2.types import TokenBatch, Trajectory


@dataclass(frozen=True)
class Case:
    """A rollout that estimators are tried on."""

    name: str
    batch: TokenBatch
    part_NP: Tensor
    group_size: int
    """Members that each group was sampled with."""
    mean_N: Tensor
    """Running mean of the role of each trajectory."""
    greedy_N: Tensor
    """Reward of a greedy response to the prompt of each trajectory."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments that the trainer would fill."""
        weight_P = torch.tensor([1.0, 0.5], dtype=torch.float64)
        parts = {"part_NP": self.part_NP, "weight_P": weight_P}
        return {"group_size": self.group_size, "mean_N": self.mean_N, "greedy_N": self.greedy_N, **parts}

    def with_equal_rewards(self, reward: float) -> Case:
        """Return the rollout in float32, with this reward for every trajectory, and equal parts."""
        last_T = self.batch.reward_T != 0
        equal = replace(
            self, name=f"{self.name}, every reward {reward:.4g}", part_NP=torch.full_like(self.part_NP, reward)
        )
        value_T = torch.full_like(self.batch.reward_T, reward)
        rewarded = self.batch.with_(reward_T=last_T.double() * reward, before_T=value_T, after_T=value_T)
        return equal.in_training(rewarded)

    def in_training(self, batch: TokenBatch) -> Case:
        """Return the case with `batch` in float32, as a run has it."""
        floats = {name: x.float() for name, x in batch.tensors().items() if x.is_floating_point()}
        return replace(self, batch=batch.with_(**floats))

    def reordered(self, ids: Sequence[int]) -> tuple[Case, Tensor]:
        """Return the case with the sequences `ids`, in that order, and the position that each position had, [T].

        Trajectories are numbered in the new order.
        """
        old_T = self.batch.with_(token_ids_T=torch.arange(len(self.batch.reward_T))).sequences(ids).token_ids_T
        batch = self.batch.sequences(ids)
        order = list(dict.fromkeys(batch.trajectory_B.tolist()))
        number = {trajectory: n for n, trajectory in enumerate(order)}
        batch = batch.with_(trajectory_B=torch.tensor([number[t] for t in batch.trajectory_B.tolist()]))
        by_N = {name: getattr(self, name)[order] for name in ("part_NP", "mean_N", "greedy_N")}
        return replace(self, batch=batch, **by_N), old_T


def cases() -> list[Case]:
    """Return rollouts as runs have them: whole groups, groups that lost members, single responses, two roles."""
    return [
        case("groups of four", (4, 4, 4), 4),
        case("groups with unscored members", (4, 2, 1), 4),
        case("groups of one with two roles", (1, 1, 1, 1, 1, 1), 1, roles=("a", "b")),
        case("groups of one", (1, 1, 1, 1, 1), 1),
        case("a single group", (4,), 4),
        case("a single trajectory", (1,), 4),
    ]


def case(name: str, sizes: Sequence[int], group_size: int, roles: Sequence[str | None] = (None,)) -> Case:
    """Return a rollout with groups of these `sizes`, in float64, the same at every call; groups have `roles` in turn.

    Trajectories have one or two sequences, and tokens of the environment between their actions. The total reward is at
    the last action.
    """
    g = torch.Generator().manual_seed(len(sizes) + sum(sizes))
    trajectories: list[Trajectory] = []
    for group, size in enumerate(sizes):
        for sample in range(size):
            sequences = []
            for _ in range(1 + len(trajectories) % 2):
                length = int(torch.randint(4, 9, (), generator=g))
                mask = [False, True, *(torch.rand(length - 3, generator=g) < 0.6).tolist(), True]
                sequences.append(TokenSequence(list(range(length)), mask, [0.0] * length, [0.0] * length))
            sequences[-1].rewards[-1] = float(torch.randn((), generator=g)) or 1.0
            trajectories.append(Trajectory(group, group, sample, sequences, role=roles[group % len(roles)]))
    batch = pack(trajectories)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    number_T = len(batch.reward_T)
    batch = batch.with_(
        reward_T=batch.reward_T.double(),
        value_T=noise(number_T),
        before_T=noise(number_T),
        after_T=noise(number_T),
        engine_logp_T=-noise(number_T).abs(),
        old_logp_T=-noise(number_T).abs(),
        old_sum_p2_T=torch.rand(number_T, generator=g, dtype=torch.float64),
        truncated_B=noise(batch.num_sequences) > 0.5,
    )
    part_NP, mean_R, greedy_G = noise(len(trajectories), 2), noise(len(roles)), noise(len(sizes))
    mean_N = mean_R[[t.group % len(roles) for t in trajectories]]
    return Case(name, batch, part_NP, group_size, mean_N, greedy_G[[t.group for t in trajectories]])


@dataclass(frozen=True)
class Subject(Tried):
    """An estimator with the settings of its knobs that it is tried at."""

    estimator: Estimator
    given: Setting
    """Knobs that are not at their defaults."""

    @property
    def declared(self) -> Estimator:
        """The estimator."""
        return self.estimator

    def where(self, setting: Setting, on: Case) -> str:
        """Return the beginning of a finding: the rollout, and the knob that is not at the base setting."""
        changed = self.named(setting)
        return f"{on.name}{', with ' if changed else ''}{changed}: "

    def result(self, setting: Setting, on: Case) -> Tensor:
        """Return the advantages at all positions, [T]. Raise Unsound if the function fails."""
        estimator = self.estimator
        inputs = {name: on.inputs[name] for name in estimator.inputs}
        try:
            return estimator(on.batch, **inputs, **setting)
        except Exception as error:
            raise Unsound(self.where(setting, on) + raises(estimator.function, error)) from error

    def at_actions(self, setting: Setting, on: Case) -> Tensor:
        """Return the advantages of the actions, [A]."""
        return self.result(setting, on)[on.batch.action_T]

    def trials(self) -> Iterator[tuple[Setting, Case]]:
        """Yield every setting with every rollout."""
        for setting in self.settings:
            for on in cases():
                yield setting, on


def contract(subject: Subject) -> str:
    """Check the signature, and that every rollout gives one number for each position."""
    parameters = list(subject.estimator.parameters.values())
    kinds = [p.kind for p in parameters]
    if kinds[:1] != [inspect.Parameter.POSITIONAL_OR_KEYWORD] or set(kinds[1:]) - {inspect.Parameter.KEYWORD_ONLY}:
        raise Unsound("its parameters must be (batch, *, knobs): all others are keyword-only, after the star")
    check_knobs(subject)
    for setting, on in subject.trials():
        before = {name: x.clone() for name, x in on.batch.tensors().items()}
        found, where = subject.result(setting, on), subject.where(setting, on)
        if not isinstance(found, Tensor) or found.shape != on.batch.reward_T.shape or not found.is_floating_point():
            shape = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise Unsound(f"{where}it returns {shape}; it must be a tensor of floats, [{len(on.batch.reward_T)}] here")
        if changed := [name for name, x in on.batch.tensors().items() if not torch.equal(x, before[name])]:
            raise Unsound(f"{where}it changes {', '.join(changed)} of the batch in place; work on a copy")
    return f"tried at {len(subject.settings)} setting(s) of its knobs on {len(cases())} rollouts"


def finite(subject: Subject) -> str:
    """Check that advantages are finite in float32, also for rewards that are all equal, zero, large or small."""
    for setting, on in subject.trials():
        rewards = {"": 1.0, "large rewards: ": 1e6, "small rewards: ": 1e-6}
        scaled = [
            replace(on, name=what + on.name, part_NP=on.part_NP * scale).in_training(
                on.batch.with_(reward_T=on.batch.reward_T * scale)
            )
            for what, scale in rewards.items()
        ]
        for each in (*scaled, on.with_equal_rewards(0.0), on.with_equal_rewards(1.0)):
            if not subject.at_actions(setting, each).isfinite().all():
                raise Unsound(
                    f"{subject.where(setting, each)}an advantage is not finite; add a small number to what it divides "
                    "by, or count at least one"
                )
    return "finite in float32, also for rewards that are equal, zero, 1e6 or 1e-6"


def deterministic(subject: Subject) -> str:
    """Check that two calls agree to the last bit, whatever the state of the random numbers."""
    for setting, on in subject.trials():
        found = []
        for seed in range(2):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                found.append(subject.at_actions(setting, on).nan_to_num())  # `finite` reports NaN
        if not torch.equal(*found):
            raise Unsound(
                f"{subject.where(setting, on)}two calls with the same rollout differ; every process has to compute the "
                "same advantages, so draw no random numbers and keep no state"
            )
    return "two calls agree to the last bit"


def declaration(subject: Subject) -> str:
    """Check that the estimator reads everything that it declares and nothing else."""
    declared = set(subject.estimator.reads)
    read = {what for what in READABLE if _depends_on(subject, what)}
    names = [what for what in READABLE if what in declared | read]
    if undeclared := [what for what in names if what not in declared]:
        line = ", ".join(repr(what) for what in names)
        raise Unsound(f"it reads {', '.join(undeclared)} without declaring it; write @reads({line})")
    if unread := [what for what in names if what not in read]:
        raise Unsound(f"it declares {', '.join(unread)} and never reads it; remove it from @reads")
    return f"reads {', '.join(names)}"


def _depends_on(subject: Subject, what: str) -> bool:
    """Return whether another `what` changes the advantages, at some setting."""
    return any(
        not torch.equal(subject.at_actions(setting, on), subject.at_actions(setting, _changed(on, what)))
        for setting in subject.settings
        for on in cases()[:3]
    )


def _changed(on: Case, what: str) -> Case:
    """Return the case with another `what`, a key of `READABLE`."""
    batch = on.batch
    if what == "parts":
        return replace(on, part_NP=on.part_NP.flip(0) + 1)
    if what == "means":
        return replace(on, mean_N=on.mean_N + 1)
    if what == "greedy":
        return replace(on, greedy_N=on.greedy_N + 1)
    if what == "groups":  # every trajectory into the group of the one three places further
        number = int(batch.trajectory_B.max()) + 1
        group_N = torch.zeros(number, dtype=torch.long).index_copy_(0, batch.trajectory_B, batch.group_B)
        others = {} if batch.role_B is None else {"role_B": batch.role_B.flip(0)}
        return replace(on, batch=batch.with_(group_B=group_N.roll(-3)[batch.trajectory_B], **others))
    assert batch.value_T is not None and batch.engine_logp_T is not None and batch.truncated_B is not None
    assert batch.old_sum_p2_T is not None
    # rewards change more for some trajectories than for others, and every other one its sign
    number_T = batch.trajectory_B[batch.sequence_T]
    factor_T = (1 + number_T.double()) * (1 - 2 * (number_T % 2))
    changes: dict[str, dict[str, Tensor]] = {
        "rewards": {"reward_T": batch.reward_T * factor_T},
        "values": {"value_T": batch.value_T.flip(0)},
        "tokens": {"token_ids_T": batch.token_ids_T + 1, "labels_T": batch.labels_T + 1},
        "logps": {"engine_logp_T": batch.engine_logp_T.flip(0)},
        "truncated": {"truncated_B": ~batch.truncated_B},
        "branches": {"before_T": batch.value_T, "after_T": -batch.value_T},
        "sum_p2": {"old_sum_p2_T": batch.old_sum_p2_T.flip(0)},
    }
    return replace(on, batch=batch.with_(**changes[what]))


def invariance(subject: Subject) -> str:
    """Check that the order of samples, groups and sequences, and the numbers of groups, have no effect."""
    for setting, on in subject.trials():
        whole_T = subject.result(setting, on)
        for how, other, old_T in _rearranged(on):
            is_action_T = other.batch.action_T
            found = subject.result(setting, other)[is_action_T].nan_to_num()  # `finite` reports NaN
            expected = whole_T[old_T][is_action_T].nan_to_num()
            if not ((found - expected).abs() <= 1e-9 * (1 + expected.abs().max())).all():
                i = int((found - expected).abs().argmax())
                raise Unsound(
                    f"{subject.where(setting, on)}an advantage is {expected[i]:.6g}, and {found[i]:.6g} after {how}; "
                    "find groups and trajectories by batch.group_B and batch.trajectory_B, not by position"
                )
    return "the same for any order of samples, groups and sequences"


def _rearranged(on: Case) -> Iterator[tuple[str, Case, Tensor]]:
    """Yield what was done, the rearranged rollout, and the position that each position had."""
    batch = on.batch
    trajectory, group = batch.trajectory_B.tolist(), batch.group_B.tolist()
    everything = list(range(batch.num_sequences))
    # the sequences of a trajectory keep their order, which is that of time
    orders = {
        "the samples of each group changed places": sorted(everything, key=lambda b: (group[b], -trajectory[b])),
        "the groups changed places": sorted(everything, key=lambda b: (-group[b], trajectory[b])),
        "the groups were mixed in the batch": sorted(everything, key=lambda b: (trajectory[b] % 3, trajectory[b])),
    }
    for how, ids in orders.items():
        yield how, *on.reordered(ids)
    turn = [trajectory[:b].count(trajectory[b]) for b in everything]
    apart = sorted(everything, key=lambda b: (turn[b], -trajectory[b]))
    yield "the sequences of a trajectory were packed apart", *on.reordered(apart)
    renumbered = replace(on, batch=batch.with_(group_B=70 - 7 * batch.group_B))
    yield "the groups were renumbered", renumbered, torch.arange(len(batch.reward_T))


def baseline(subject: Subject) -> str:
    """Check the claim that equal rewards have no advantage, if it is made."""
    if not subject.estimator.baseline:
        return "none claimed"
    for setting, on in subject.trials():
        for reward in (1.0, 0.1, 1 / 3, -5.3):
            equal = on.with_equal_rewards(reward)
            found = subject.at_actions(setting, equal)
            if found.any():
                raise Unsound(
                    f"{subject.where(setting, equal)}an advantage is {found[found != 0][0]:.3g}; it claims a baseline, "
                    "so it must be exactly 0: compute means in float64 and drop what is rounding (RL2.types.ROUNDING), "
                    "or declare no baseline"
                )
    return "equal rewards have advantages of exactly 0"


def effects(subject: Subject) -> str:
    """Check that every knob changes the advantages."""

    def differ(one: Setting, other: Setting) -> bool:
        return any(not torch.equal(subject.at_actions(one, on), subject.at_actions(other, on)) for on in cases())

    return check_effects(subject, differ)


CHECKS: dict[str, Callable[[Subject], str]] = {
    "contract": contract,
    "finite": finite,
    "deterministic": deterministic,
    "declaration": declaration,
    "invariance": invariance,
    "baseline": baseline,
    "knobs": effects,
}


def check(source: str | Estimator, given: Mapping[str, Any] | None = None) -> list[Finding]:
    """Return a finding for each check of an estimator: a built-in name, `path.py:function`, or the estimator itself.

    `given` has the knobs that are not at their defaults. If the contract is broken, the other checks do not run. Raise
    ConfigError for an estimator or a knob that cannot be found.
    """
    estimator = registry.find(source) if isinstance(source, str) else source
    if not isinstance(estimator, Estimator):
        raise ConfigError(f"{source}: say what it reads, {registry.DECLARATION}")
    subject = Subject(estimator, dict(given or {}))
    estimator.refuse_unknown(subject.given, str(source))
    findings = [_run(subject, "contract")]
    if not findings[0].passed:
        return findings
    return findings + [_run(subject, name) for name in CHECKS if name != "contract"]


def assert_sound(source: str | Estimator, given: Mapping[str, Any] | None = None) -> None:
    """Raise AssertionError, with a line for each check that failed; for tests."""
    assert_passed(check(source, given))


def _run(subject: Subject, name: str) -> Finding:
    try:
        return Finding(name, True, CHECKS[name](subject))
    except Unsound as error:
        return Finding(name, False, str(error))
