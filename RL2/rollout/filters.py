"""Selection of the trajectories of a rollout that train."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence as Seq

from RL2.batch.registry import configured as estimator_of
from RL2.config.functions import function_of
from RL2.config.programs import RLConfig
from RL2.config.scripts import described
from RL2.errors import UserError
from RL2.rollout.metrics import NothingScored, drop_equal_groups, drop_groups_of_equal_parts, groups, scored
from RL2.types import Trajectory


def usable(trajectories: Seq[Trajectory], config: RLConfig) -> list[Trajectory]:
    """Return the scored trajectories of the policy and, with overlong filtering, only those not truncated."""
    played = [trajectory for trajectory in scored(trajectories) if trajectory.sequences]  # not those of opponents
    return [t for t in played if not (t.truncated and config.rollout.overlong_filtering)]


def with_signal(trajectories: Seq[Trajectory], config: RLConfig) -> list[Trajectory]:
    """Return the usable trajectories of the groups that `dynamic_filtering` and `rollout.filter` keep."""
    kept = usable(trajectories, config)
    if config.rollout.dynamic_filtering:
        if "parts" in estimator_of(config.adv).estimator.reads:
            kept = drop_groups_of_equal_parts(kept, config.reward.weights)
        else:
            kept = drop_equal_groups(kept)
    return kept_by(config.rollout.filter, kept) if config.rollout.filter is not None and kept else kept


def kept_by(name: str, trajectories: Seq[Trajectory]) -> list[Trajectory]:
    """Return the trajectories that the function `path.py:function` keeps, in their order.

    The function gets a list of groups, each a list of trajectories, and returns those that train. Roles have groups of
    their own. Raise UserError if it fails or returns something else.
    """
    function, by_group = function_of("rollout.filter", name), defaultdict(list)
    for trajectory in trajectories:
        by_group[trajectory.group, trajectory.role].append(trajectory)
    given = {id(trajectory) for trajectory in trajectories}
    try:
        kept = {id(trajectory) for group in function(list(by_group.values())) for trajectory in group}
    except Exception as error:
        path = name.rpartition(":")[0]
        raise UserError(
            f"rollout.filter={name} raises {described(error, path, inspect.getfile(function))}; it gets a list of "
            "groups and returns a list of those that train"
        ) from error
    if not kept <= given:
        raise UserError(
            f"rollout.filter={name} returns a trajectory that it was not given; return trajectories of its groups, "
            "no copies"
        )
    return [trajectory for trajectory in trajectories if id(trajectory) in kept]


def success_rates(trajectories: Seq[Trajectory]) -> dict[int, float]:
    """Return, for each row, the share of its scored trajectories whose reward is above 0."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for trajectory in scored(trajectories):
        if trajectory.role is None or trajectory.sequences:
            rewards[trajectory.row].append(trajectory.reward)
    return {row: sum(reward > 0 for reward in of_row) / len(of_row) for row, of_row in rewards.items()}


def trainable(trajectories: Seq[Trajectory], kept: list[Trajectory], config: RLConfig) -> list[Trajectory]:
    """Return `kept`, which is `with_signal` of the trajectories, or all usable ones if it is empty.

    Raise NothingScored if none is usable.
    """
    if not (found := kept or usable(trajectories, config)):
        raise NothingScored(
            f"each of the {len(trajectories)} trajectories is unscored or ran into a length limit, and "
            "rollout.overlong_filtering=true leaves none to train on; set it to false or raise "
            "rollout.train_sampling_params.max_new_tokens"
        )
    return found


def filter_metrics(trajectories: Seq[Trajectory], kept: Seq[Trajectory], config: RLConfig) -> dict[str, float]:
    """Return the share of the sampled groups that filters dropped, if a filter is on; `kept` is what they kept."""
    if not config.rollout.dynamic_filtering and config.rollout.filter is None:
        return {}
    return {"train/filtered": 1 - len(groups(kept)) / len(groups(trajectories))}
