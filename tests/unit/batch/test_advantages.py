"""Advantages against the formulas of their papers, written out trajectory by trajectory in float64."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev

import pytest
import torch

from RL2.batch.advantages import gae, reinforce, rloo, whitened
from RL2.batch.packing import pack
from RL2.types import Sequence, TokenBatch, Trajectory

BOTH = {"global_norm": True, "norm_var": True}


def rollout(groups: list[int], rewards: list[float]) -> TokenBatch:
    """Trajectories of two prompt and three response tokens; the reward stands on the last."""
    return pack(
        [
            Trajectory(0, group, 0, [Sequence([0] * 5, [False] * 2 + [True] * 3, [0.0] * 5, [0.0] * 4 + [reward])])
            for group, reward in zip(groups, rewards, strict=True)
        ]
    )


def by_trajectory(batch: TokenBatch, advantage_T: torch.Tensor) -> list[float]:
    """The one advantage that all actions of a trajectory have; other positions have 0."""
    assert not advantage_T[~batch.action_T].any()
    found = [
        advantage_T[batch.action_T & (batch.sequence_T == b)].unique().tolist() for b in range(batch.num_sequences)
    ]
    assert all(len(values) == 1 for values in found)
    return [values[0] for values in found]


def test_rloo_compares_with_the_mean_of_the_others() -> None:
    groups, rewards = [7, 7, 7, 2, 2, 5], [1.0, 0.0, 0.5, 1.0, -2.0, 3.0]
    batch = rollout(groups, rewards)
    expected = []
    for i, (group, reward) in enumerate(zip(groups, rewards, strict=True)):
        others = [r for j, (g, r) in enumerate(zip(groups, rewards, strict=True)) if g == group and j != i]
        expected.append(reward - mean(others) if others else 0.0)  # a group of one among larger ones has no signal
    assert by_trajectory(batch, rloo(batch)) == pytest.approx(expected)


def test_rloo_with_groups_of_one_compares_with_the_rest_of_the_rollout() -> None:
    rewards = [1.0, 0.0, 0.5, 4.0]
    batch = rollout([3, 1, 4, 2], rewards)
    expected = [r - (sum(rewards) - r) / 3 for r in rewards]
    assert by_trajectory(batch, rloo(batch)) == pytest.approx(expected)
    alone = rollout([0], [1.0])
    assert by_trajectory(alone, rloo(alone)) == [0.0]


def test_reinforce_plus_plus_normalises_over_the_rollout() -> None:
    rewards = [1.0, 0.0, 0.5, 4.0, -1.0, 2.5]
    expected = [(r - mean(rewards)) / stdev(rewards) for r in rewards]
    for groups in ([0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]):
        batch = rollout(groups, rewards)
        advantage_T = reinforce(batch, global_norm=True, norm_var=True)
        assert by_trajectory(batch, advantage_T) == pytest.approx(expected, rel=1e-5)
    # one response a prompt: the whole rollout is the group, asked for or not
    assert by_trajectory(batch, reinforce(batch, global_norm=False, norm_var=True)) == pytest.approx(expected, rel=1e-5)


def test_the_deviation_of_the_rollout_under_the_mean_of_the_group() -> None:
    """TRL's `scale_rewards="batch"`."""
    groups, rewards = [0, 0, 0, 0, 1, 1, 1, 1], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    batch = rollout(groups, rewards)
    means = [mean(rewards[:4])] * 4 + [mean(rewards[4:])] * 4
    expected = [(r - m) / stdev(rewards) for r, m in zip(rewards, means, strict=True)]
    found_T = reinforce(batch, global_norm=False, norm_var=True, std_over="rollout")
    assert by_trajectory(batch, found_T) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("global_norm", [True, False])
def test_reinforce_plus_plus_of_the_paper_whitens_tokens(global_norm: bool) -> None:
    """Equation 10 of 2501.03262, and with the mean of the group first its variant for groups."""
    lengths, rewards, groups = (10, 90, 40, 3), (1.0, 0.0, 0.5, 2.0), (0, 0, 1, 1)
    trajectories = []
    for n, (length, reward, group) in enumerate(zip(lengths, rewards, groups, strict=True)):
        zeros = [0.0] * (length + 1)
        sequence = Sequence([0] * (length + 1), [False] + [True] * length, zeros, [*zeros[1:], reward])
        trajectories.append(Trajectory(n, group, 0, [sequence]))
    batch = pack(trajectories)
    means = [mean(rewards)] * 4 if global_norm else [0.5, 0.5, 1.25, 1.25]
    by_token = [r - m for n, r, m in zip(lengths, rewards, means, strict=True) for _ in range(n)]
    expected = [(x - mean(by_token)) / stdev(by_token) for x in by_token]
    found_T = reinforce(batch, global_norm=global_norm, norm_var=True, std_over="tokens")
    assert found_T.tolist() == pytest.approx(expected, rel=1e-5)


ESTIMATORS: dict[str, Callable[[TokenBatch], torch.Tensor]] = {
    "rloo": rloo,
    "whitened": lambda batch: whitened(batch, batch.reward_T[batch.reward_T != 0][0] * batch.action_T, **BOTH),
    **{
        f"reinforce {knobs}": lambda batch, knobs=knobs: reinforce(batch, **knobs)
        for knobs in (
            {"global_norm": False, "norm_var": False},
            {"global_norm": False, "norm_var": True},
            {"global_norm": True, "norm_var": True},
            {"global_norm": False, "norm_var": True, "std_over": "rollout"},
            {"global_norm": False, "norm_var": True, "std_over": "tokens"},
        )
    },
}


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 0.9, -5.3, 10.1, 100.1, 12345.678, 1e-5])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_have_no_advantage(estimator: str, reward: float) -> None:
    for size in range(2, 12):
        assert not ESTIMATORS[estimator](rollout([4] * size, [reward] * size)).any()


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "whitened"])
def test_rewards_that_are_equal_but_for_rounding_have_no_advantage(estimator: str) -> None:
    """0.9, as one reward, as the sum of two and as what is left of a larger one."""
    turns = ([0.0, 0.0, 0.9], [0.6, 0.0, 0.3], [1.5, -0.3, -0.3], [0.1, 0.5, 0.3])
    sequences = [Sequence([0] * 4, [False] + [True] * 3, [0.0] * 4, [0.0, *rewards]) for rewards in turns]
    batch = pack([Trajectory(0, 0, n, [sequence]) for n, sequence in enumerate(sequences)])
    assert not ESTIMATORS[estimator](batch).any()


def test_small_differences_of_large_rewards_count() -> None:
    batch = rollout([0, 0], [1000.0, 1000.01])
    assert by_trajectory(batch, reinforce(batch, global_norm=False, norm_var=True)) == pytest.approx(
        [-0.7071, 0.7071], rel=1e-3
    )


@pytest.mark.parametrize(
    "estimator", [rloo, lambda batch, **how: reinforce(batch, global_norm=False, norm_var=True, **how)]
)
def test_what_is_compared_does_not_depend_on_what_filters_left(estimator: Callable[..., torch.Tensor]) -> None:
    """One member is left of each group of four: it has nothing to be compared with."""
    batch = rollout([0, 1, 2], [1.0, 0.0, 2.0])
    assert not estimator(batch, group_size=4).any()
    assert estimator(batch, group_size=1).any()


def random_episodes() -> TokenBatch:
    """Trajectories of one to three sequences, whose turns stand between tokens of the environment; float64."""
    g = torch.Generator().manual_seed(0)
    trajectories = []
    for n in range(7):
        sequences = []
        for _ in range(n % 3 + 1):
            length = int(torch.randint(2, 30, (), generator=g))
            mask = [False, *(torch.rand(length - 1, generator=g) < 0.6).tolist()]
            rewards = [float(torch.randn((), generator=g)) if a else 0.0 for a in mask]
            sequences.append(Sequence([0] * length, mask, [0.0] * length, rewards))
        trajectories.append(Trajectory(0, n, 0, sequences))
    batch = pack(trajectories)
    value_T = torch.randn(len(batch.labels_T), generator=g, dtype=torch.float64)
    return batch.with_(reward_T=batch.reward_T.double(), value_T=value_T)


@pytest.mark.parametrize(("gamma", "lamda"), [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0), (0.0, 0.5)])
def test_gae_is_the_recursion_of_the_paper(gamma: float, lamda: float) -> None:
    batch = random_episodes()
    # the sequences of a trajectory need not lie side by side
    batch = batch.sequences(sorted(range(batch.num_sequences), key=lambda b: b % 2))
    assert batch.value_T is not None
    trajectory_T = batch.trajectory_B[batch.sequence_T]
    expected_T = torch.zeros_like(batch.value_T)
    for n in range(7):
        steps = (batch.action_T & (trajectory_T == n)).nonzero()[:, 0].tolist()
        for i, t in enumerate(steps):
            advantage = 0.0
            for k, u in enumerate(steps[i:], start=i):
                after = batch.value_T[steps[k + 1]].item() if k + 1 < len(steps) else 0.0
                delta = batch.reward_T[u].item() + gamma * after - batch.value_T[u].item()
                advantage += (gamma * lamda) ** (k - i) * delta
            expected_T[t] = advantage
    torch.testing.assert_close(gae(batch, gamma=gamma, lamda=lamda), expected_T, rtol=1e-12, atol=1e-12)


def test_gae_without_discount_is_what_lies_ahead_minus_the_value() -> None:
    batch = rollout([0, 0], [1.0, -2.0]).with_(value_T=torch.arange(8.0))
    # positions: one of the prompt, three of the response, twice
    assert gae(batch, gamma=1.0, lamda=1.0).tolist() == [0, 1 - 1, 1 - 2, 1 - 3, 0, -2 - 5, -2 - 6, -2 - 7]


def test_gae_of_no_action_is_nothing() -> None:
    batch = pack([Trajectory(0, 0, 0, [Sequence([0] * 3, [False] * 3, [0.0] * 3, [0.0] * 3)])])
    assert gae(batch.with_(value_T=torch.ones(2)), gamma=1.0, lamda=1.0).tolist() == [0, 0]


def test_gae_credits_a_reward_of_given_tokens_to_the_action_before() -> None:
    """The second turn trains nothing, but its reward counts; one before the first action is nobody's."""
    mask = [False, True, True, False, False, True, False]
    rewards = [0.0, 0.0, 1.0, 0.0, 5.0, 0.0, 2.0]
    batch = pack([Trajectory(0, 0, 0, [Sequence([0] * 7, mask, [0.0] * 7, rewards)])])
    batch = batch.with_(value_T=torch.zeros(6))
    assert gae(batch, gamma=1.0, lamda=1.0).tolist() == [8, 8, 0, 0, 2, 0]
    assert gae(batch, gamma=0.5, lamda=1.0).tolist() == [0 + 6 / 2 + 2 / 4, 6 + 2 / 2, 0, 0, 2, 0]
    given = pack(
        [Trajectory(0, 0, 0, [Sequence([0] * 4, [False, False, True, True], [0.0] * 4, [0.0, 3.0, 0.0, 1.0])])]
    )
    assert gae(given.with_(value_T=torch.zeros(3)), gamma=1.0, lamda=1.0).tolist() == [0, 1, 1]


@pytest.mark.parametrize(("global_norm", "norm_var"), [(False, False), (True, False), (False, True), (True, True)])
def test_whitening_is_over_all_action_tokens(global_norm: bool, norm_var: bool) -> None:
    batch = random_episodes()
    raw_T = torch.where(batch.action_T, batch.value_T * 3 + 1, 0)  # type: ignore[operator]
    values = raw_T[batch.action_T].tolist()
    found_T = whitened(batch, raw_T, global_norm=global_norm, norm_var=norm_var)
    shift, scale = mean(values) if global_norm else 0.0, stdev(values) if norm_var else 1.0
    assert found_T[batch.action_T].tolist() == pytest.approx([(x - shift) / scale for x in values], rel=1e-7)
    assert not found_T[~batch.action_T].any()
