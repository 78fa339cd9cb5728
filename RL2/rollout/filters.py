"""Selection of the trajectories of a rollout that train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Seq

from RL2.batch.registry import configured as estimator_of
from RL2.config.programs import RLConfig
from RL2.rollout.collect import NothingScored, drop_equal_groups, drop_groups_of_equal_parts, groups, scored
from RL2.types import Trajectory


def usable(trajectories: Seq[Trajectory], config: RLConfig) -> list[Trajectory]:
    """Return the scored trajectories and, with overlong filtering, only those that were not truncated."""
    return [t for t in scored(trajectories) if not (t.truncated and config.rollout.overlong_filtering)]


def with_signal(trajectories: Seq[Trajectory], config: RLConfig) -> list[Trajectory]:
    """Return those of groups whose rewards differ, with dynamic filtering: for GDPO in their parts."""
    kept = usable(trajectories, config)
    if not config.rollout.dynamic_filtering:
        return kept
    if "parts" in estimator_of(config.adv).estimator.reads:
        return drop_groups_of_equal_parts(kept, config.reward.weights)
    return drop_equal_groups(kept)


def success_rates(trajectories: Seq[Trajectory]) -> dict[int, float]:
    """Return row -> the share of its scored trajectories whose reward is above 0."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for trajectory in scored(trajectories):
        rewards[trajectory.row].append(trajectory.reward)
    return {row: sum(reward > 0 for reward in of_row) / len(of_row) for row, of_row in rewards.items()}


def trainable(trajectories: Seq[Trajectory], config: RLConfig) -> list[Trajectory]:
    """Return the trajectories of groups with a signal, or all usable ones if no group has a signal.

    Raise NothingScored if none is usable.
    """
    if not (kept := usable(trajectories, config)):
        raise NothingScored(
            f"each of the {len(trajectories)} trajectories is unscored or ran into a length limit, and "
            "rollout.overlong_filtering=true leaves none to train on; set it to false or raise "
            "rollout.train_sampling_params.max_new_tokens"
        )
    return with_signal(kept, config) or kept


def filter_metrics(trajectories: Seq[Trajectory], config: RLConfig) -> dict[str, float]:
    """Return the share of the sampled groups that dynamic filtering dropped, if it is on."""
    if not config.rollout.dynamic_filtering:
        return {}
    return {"train/filtered": 1 - len(groups(with_signal(trajectories, config))) / len(groups(trajectories))}
