"""Metrics of the trajectories of a rollout, and which of their groups have a signal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from statistics import fmean

import numpy as np
import torch

from RL2.batch.advantages import decoupled
from RL2.batch.packing import part_rewards
from RL2.errors import UserError
from RL2.rollout.roles import lengths_by_role
from RL2.types import ROUNDING, Trajectory


def groups(trajectories: Seq[Trajectory]) -> set[int]:
    return {trajectory.group for trajectory in trajectories}


def scored(trajectories: Seq[Trajectory]) -> list[Trajectory]:
    return [trajectory for trajectory in trajectories if trajectory.unscored is None]


def unscored_causes(trajectories: Seq[Trajectory]) -> Counter[str]:
    return Counter(trajectory.unscored for trajectory in trajectories if trajectory.unscored is not None)


class NothingScored(UserError, RuntimeError):
    """An error: not one trajectory of a rollout has a reward."""


def raise_if_all_unscored(trajectories: Seq[Trajectory], of: str = "") -> None:
    """Raise NothingScored if there is nothing to learn from or report on: the environment is broken.

    `of` names the test set.
    """
    if trajectories and not scored(trajectories):
        causes = unscored_causes(trajectories).most_common(5)
        listed = "".join(f"\n  {count} times: {cause}" for cause, count in causes)
        raise NothingScored(
            f"none of the {len(trajectories)} trajectories{of} has a reward; the most common causes:{listed}"
        )


def drop_equal_groups(trajectories: Seq[Trajectory]) -> list[Trajectory]:
    """Return those of groups with a signal for a group baseline: two scored members at least, and unequal rewards.

    Each role has groups of its own. Rewards are equal where they differ by no more than rounding, as 0.1 + 0.2 and 0.3
    do.
    """
    rewards: defaultdict[tuple[int, str | None], list[float]] = defaultdict(list)
    for trajectory in scored(trajectories):
        rewards[trajectory.group, trajectory.role].append(trajectory.reward)
    unequal = {group for group, of in rewards.items() if max(of) - min(of) > ROUNDING * max(map(abs, of))}
    return [trajectory for trajectory in trajectories if (trajectory.group, trajectory.role) in unequal]


def drop_groups_of_equal_parts(trajectories: Seq[Trajectory], weights: Mapping[str, float]) -> list[Trajectory]:
    """Return those of groups where GDPO's advantages are not all 0; `trajectories` are scored.

    Parts of the rewards may differ where their sums are equal, and cancel where these differ.
    """
    if not trajectories:
        return []
    names = [(trajectory.group, trajectory.role) for trajectory in trajectories]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    group_N = torch.tensor([numbers[name] for name in names])
    sum_N = decoupled(*part_rewards(trajectories, weights), group_N)
    kept = {name for name, value in zip(names, sum_N.tolist(), strict=True) if value}
    return [trajectory for trajectory, name in zip(trajectories, names, strict=True) if name in kept]


def rollout_metrics(trajectories: Seq[Trajectory], prefix: str) -> dict[str, float]:
    """Return metrics of a rollout, means over trajectories unless said otherwise. A mean over nothing is left out.

    score, reward: of the scored trajectories. reward/NAME: a part of it, or the reward of a role; env/NAME: what the
    environment measured; of those that have it. length: sampled tokens. length/ROLE: those of a role. turns: responses.
    truncated: share. tokens, unscored: counts. entropy: mean of -logp over all sampled tokens, in nats; when sampling
    at temperature 1 from all tokens that is an unbiased estimate of the policy's entropy, otherwise a cross-entropy of
    no meaning but its trend.
    """
    rated = scored(trajectories)
    sampled = [each.logps[each.action_mask] for trajectory in trajectories for each in trajectory.sequences]
    logp_N = np.concatenate([np.zeros(0, np.float32), *sampled])
    values: dict[str, list[float]] = {
        "score": [trajectory.score for trajectory in rated],
        "reward": [trajectory.reward for trajectory in rated],
        "length": [trajectory.num_tokens for trajectory in trajectories],
        "entropy": [-float(logp_N.mean(dtype=np.float64))] if len(logp_N) else [],
        "truncated": [trajectory.truncated for trajectory in trajectories],
        "turns": [len(trajectory.texts) // 2 for trajectory in trajectories],
    }
    values |= {f"reward/{name}": each for name, each in by_name(trajectory.parts for trajectory in rated).items()}
    values |= {f"env/{name}": each for name, each in by_name(trajectory.metrics for trajectory in trajectories).items()}
    values |= {f"length/{role}": each for role, each in lengths_by_role(trajectories).items()}
    metrics = {f"{prefix}/{name}": fmean(each) for name, each in values.items() if each}
    counts = {"tokens": sum(values["length"]), "unscored": len(trajectories) - len(rated)}
    return metrics | {f"{prefix}/{name}": float(count) for name, count in counts.items()}


def by_name(measured: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return name -> the values of those that have one, in order of names."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for each in measured:
        for name, value in each.items():
            values[name].append(value)
    return dict(sorted(values.items()))


def staleness(trajectories: Seq[Trajectory], step: int, bound: int) -> dict[str, float]:
    """Return how many versions older than those of `step` the sampling weights were; nothing if `bound` is 0.

    staleness/0, /1, ...: share of the trajectories whose oldest token is of so many versions before. tokens: mean over
    all.
    """
    if not bound:
        return {}
    versions = [trajectory.versions for trajectory in trajectories]
    ages = Counter(step - min(of, default=step) for of in versions)
    tokens = sum(versions, Counter[int]())
    metrics = {f"staleness/{age}": ages[age] / len(trajectories) for age in range(bound + 1)}
    mean = sum((step - version) * number for version, number in tokens.items()) / tokens.total()
    return metrics | {"staleness/tokens": mean}
