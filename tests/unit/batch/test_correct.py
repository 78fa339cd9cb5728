"""Which trajectories are correct: one answer everywhere, and rounding has no say in it."""

from __future__ import annotations

from decimal import Decimal
from random import Random

import pytest

from RL2.batch.advantages import reward_of_sequences
from RL2.batch.packing import kept, pack
from RL2.rollout.continuation import append
from RL2.rollout.filters import success_rates
from RL2.rollout.metrics import drop_equal_groups
from RL2.types import Sequence, Trajectory


def trajectory(row: int, rewards: list[str], group: int = 0) -> Trajectory:
    """A turn for each reward, every other one in a sequence of its own."""
    sequences: list[Sequence] = []
    for turn, reward in enumerate(rewards):
        if turn % 2 == 0:
            sequences.append(Sequence([1], [False], [0.0], [0.0], [-1]))
        append(sequences[-1], [2], [-1.0], [0])
        sequences[-1].rewards[-1] = float(reward)
        append(sequences[-1], [3])
    return Trajectory(row=row, group=group, sample=0, sequences=sequences)


def with_total(total: Decimal, rng: Random, scale: Decimal) -> list[str]:
    """Decimal rewards of a few turns, which are not exact in binary, with exactly this sum."""
    rewards = [scale * rng.randint(-999, 999) / 1000 for _ in range(rng.randint(1, 7))]
    return [str(reward) for reward in (*rewards, total - sum(rewards))]


@pytest.mark.parametrize("scale", ["0.001", "1", "1000"])
def test_every_place_agrees_with_exact_arithmetic(scale: str) -> None:
    rng, unit = Random(0), Decimal(scale)
    totals = [unit * rng.choice([-10, -1, 0, 0, 1, 10]) / 1000 for _ in range(200)]
    trajectories = [trajectory(row, with_total(total, rng, unit)) for row, total in enumerate(totals)]
    expected = [total > 0 for total in totals]
    assert [t.reward > 0 for t in trajectories] == expected
    assert [t.reward == 0 for t in trajectories] == [total == 0 for total in totals]
    assert [rate > 0 for rate in success_rates(trajectories).values()] == expected
    batch = pack(trajectories)
    of_sequence = [expected[n] for n in batch.trajectory_B.tolist()]
    assert (reward_of_sequences(batch) > 0).tolist() == of_sequence
    trained_T = kept(batch, train_on="correct")
    assert trained_T.tolist() == (batch.action_T & batch.action_T.new_tensor(of_sequence)[batch.sequence_T]).tolist()


def test_groups_of_equal_rewards_have_no_signal_however_they_add_up() -> None:
    rng = Random(1)
    for total in map(Decimal, ("0.3", "1", "-2.7", "0")):
        equal = [trajectory(0, with_total(total, rng, Decimal(1)), group=0) for _ in range(4)]
        unequal = [trajectory(1, with_total(total + n, rng, Decimal(1)), group=1) for n in (0, 0, 0, Decimal("0.001"))]
        assert drop_equal_groups([*equal, *unequal]) == unequal
