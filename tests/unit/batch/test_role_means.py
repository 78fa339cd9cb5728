"""Advantages by role: running means as in SPIRAL, and baselines among trajectories of one role."""

from __future__ import annotations

import json

import pytest
import torch

from RL2.batch.advantages import rae, reinforce, rloo
from RL2.batch.packing import pack
from RL2.batch.role_means import RoleMeans
from RL2.types import Sequence, Trajectory


def part(group: int, sample: int, role: str | None, reward: float) -> Trajectory:
    return Trajectory(
        0, group, sample, [Sequence([1, 2, 3], [False, True, True], [0.0] * 3, [0.0, 0.0, reward])], role=role
    )


REWARDS = {"a": [1.0, 0.0, 2.0, -1.0], "b": [-1.0, 0.5, 0.25, 0.0]}


def rollout(responses: int = 2, shift: float = 0.0) -> list[Trajectory]:
    return [
        part(n // responses, n % responses, role, REWARDS[role][n] + shift) for n in range(4) for role in ("a", "b")
    ]


def test_the_running_mean_is_that_of_the_paper() -> None:
    means, alpha = RoleMeans(0.9), 0.9
    expected: dict[str, float] = {}
    for shift in (0.0, 1.0, -3.0):
        parts = rollout(shift=shift)
        for role in ("a", "b"):
            expected.setdefault(role, sum(REWARDS[role]) / 4)
        before = dict(expected)
        rewards_N = torch.tensor([each.reward for each in parts], dtype=torch.float64)
        mean_N = means.baseline([each.role for each in parts], rewards_N)
        assert mean_N.tolist() == [pytest.approx(before[each.role or ""], abs=1e-15) for each in parts]
        batch = pack(parts)
        advantage_T = rae(batch, mean_N=mean_N)
        for number, each in enumerate(parts):
            assert advantage_T[2 * number].item() == pytest.approx(each.reward - before[each.role or ""], abs=1e-6)
        for each in parts:  # the recursion of SPIRAL, trajectory by trajectory
            expected[each.role or ""] = alpha * expected[each.role or ""] + (1 - alpha) * each.reward
        assert means.means == pytest.approx(expected, abs=1e-15)


def test_means_survive_a_checkpoint_to_the_last_bit() -> None:
    means = RoleMeans(0.95)
    means.baseline(["a", None], torch.tensor([1 / 3, 0.1], dtype=torch.float64))
    again = RoleMeans(0.95)
    again.load_state_dict(json.loads(json.dumps({"position": 3} | means.state_dict())))
    assert again.means == means.means == {"a": 1 / 3, "": 0.1}
    again.load_state_dict({})  # a checkpoint of another estimator
    assert again.means == {}
    with pytest.raises(ValueError, match="running means of roles are not numbers"):
        again.load_state_dict({"role_means": {"a": "1"}})


def test_groups_have_one_role() -> None:
    advantage_T = reinforce(pack(rollout()), group_size=2)
    assert advantage_T[::2].tolist() == [0.5, -0.75, -0.5, 0.75, 1.5, 0.125, -1.5, -0.125]


@pytest.mark.parametrize("how", ["global_norm", "groups of one", "rloo"])
def test_a_whole_rollout_is_compared_within_a_role(how: str) -> None:
    batch = pack(rollout(responses=1))
    if how == "rloo":
        advantage_T, factor = rloo(batch, group_size=1), 4 / 3
    else:
        advantage_T, factor = reinforce(batch, global_norm=how == "global_norm", group_size=1), 1.0
    for number, each in enumerate(rollout(responses=1)):
        of = REWARDS[each.role or ""]
        assert advantage_T[2 * number].item() == pytest.approx(factor * (each.reward - sum(of) / 4))
