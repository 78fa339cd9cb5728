"""Packing, weights, advantages and the plan: small cases worked out by hand."""

import random

import numpy as np
import pytest
import torch

from RL2.batch.advantages import reinforce, spo
from RL2.batch.packing import cost, loss_weights, microbatches, minibatches, pack, pack_arrays, plan, units
from RL2.types import Sequence, TokenBatch, Trajectory


def trajectory(group: int, reward: float, lengths: tuple[tuple[int, int], ...], row: int = 0) -> Trajectory:
    """`lengths`: prompt and response tokens of each sequence; the reward stands on the last response token."""
    sequences = []
    for i, (prompt, response) in enumerate(lengths):
        n = prompt + response
        rewards = [0.0] * n
        if i == len(lengths) - 1:
            rewards[-1] = reward
        ids = list(range(100 * group, 100 * group + n))
        mask = [False] * prompt + [True] * response
        sequences.append(Sequence(ids, mask, [-0.5 if a else 0.0 for a in mask], rewards))
    return Trajectory(row=row, group=group, sample=0, sequences=sequences)


@pytest.fixture
def batch() -> TokenBatch:
    """Two groups of two; the third trajectory has two sequences."""
    return pack(
        [
            trajectory(0, 1.0, ((2, 3),)),
            trajectory(0, 0.0, ((2, 1),)),
            trajectory(1, 1.0, ((1, 2), (3, 4))),
            trajectory(1, 1.0, ((1, 1),)),
        ]
    )


def test_arrays_are_packed_like_trajectories() -> None:
    draw = random.Random(0)
    ids = [[draw.randrange(99) for _ in range(draw.randint(2, 9))] for _ in range(7)]
    masks = [[draw.random() < 0.5 for _ in each] for each in ids]
    rewards = [float(n % 2) for n in range(len(ids))]
    trajectories = [
        Trajectory(
            n, n // 2, 0, [Sequence(ids[n], masks[n], [0.0] * len(ids[n]), [0.0] * (len(ids[n]) - 1) + [reward])]
        )
        for n, reward in enumerate(rewards)
    ]
    expected = pack(trajectories).tensors()
    arrays = [np.array(each, np.int32) for each in ids], [np.array(each) for each in masks]
    found = pack_arrays(*arrays, rewards, [n // 2 for n in range(len(ids))]).tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_labels_are_shifted_once(batch: TokenBatch) -> None:
    first = batch.sequences([0])
    assert first.token_ids_T.tolist() == [0, 1, 2, 3]
    assert first.labels_T.tolist() == [1, 2, 3, 4]
    assert first.action_T.tolist() == [False, True, True, True]
    assert first.reward_T.tolist() == [0, 0, 0, 1]
    assert first.position_ids_T.tolist() == [0, 1, 2, 3]
    assert batch.lengths_B.tolist() == [4, 2, 2, 6, 1]
    assert batch.trajectory_B.tolist() == [0, 1, 2, 2, 3]


def test_choosing_sequences_and_positions(batch: TokenBatch) -> None:
    chosen = batch.sequences([3, 0])
    assert chosen.token_ids_T.tolist() == [100, 101, 102, 103, 104, 105, 0, 1, 2, 3]
    actions = chosen.positions(chosen.action_T)
    assert actions.labels_T.tolist() == [103, 104, 105, 106, 2, 3, 4]
    assert actions.cu_seqlens.tolist() == [0, 4, 7]
    none = chosen.positions(torch.zeros_like(chosen.action_T))
    assert none.cu_seqlens.tolist() == [0, 0, 0]


def weights_of(batch: TokenBatch, **how: str) -> list[float]:
    """The weight of each action token, a number a sequence (all tokens of a sequence weigh the same)."""
    weight_T = loss_weights(batch, **how)  # type: ignore[arg-type]
    assert not weight_T[~batch.action_T].any()
    per_sequence = []
    for b in range(batch.num_sequences):
        own = weight_T[(batch.sequence_T == b) & batch.action_T]
        assert len(own.unique()) == 1
        per_sequence.append(own[0].item())
    return per_sequence


def test_weights(batch: TokenBatch) -> None:
    token = weights_of(batch, train_on="all", level="token", average_over="all")
    assert token == pytest.approx([1 / 11] * 5)
    sequence = weights_of(batch, train_on="all", level="sequence", average_over="all")
    assert sequence == pytest.approx([1 / 15, 1 / 5, 1 / 10, 1 / 20, 1 / 5])
    # thesis 3.1: wrong sequences have weight 0 and count in the number of sequences
    correct = weights_of(batch, train_on="correct", level="sequence", average_over="all")
    assert correct == pytest.approx([1 / 15, 0, 1 / 10, 1 / 20, 1 / 5])
    # thesis 3.2: only the correct ones count
    kept = weights_of(batch, train_on="correct", level="sequence", average_over="kept")
    assert kept == pytest.approx([1 / 12, 0, 1 / 8, 1 / 16, 1 / 4])
    kept_token = weights_of(batch, train_on="correct", level="token", average_over="kept")
    assert kept_token == pytest.approx([1 / 10, 0, 1 / 10, 1 / 10, 1 / 10])


def test_tokens_that_selection_leaves_out_may_count(batch: TokenBatch) -> None:
    entropy_T = torch.arange(len(batch.token_ids_T), dtype=torch.float32)
    chosen = batch.with_(old_entropy_T=entropy_T)
    how = {"train_on": "correct", "level": "sequence", "entropy_quantile": 0.5}
    over = {name: loss_weights(chosen, average_over=name, **how) for name in ("kept", "correct")}  # type: ignore[arg-type]
    trained_T = over["kept"] > 0
    assert 0 < trained_T.sum() < (batch.action_T & (batch.sequence_T != 1)).sum()
    assert torch.equal(over["correct"] > 0, trained_T)
    # the fork's path program: each token 1 / (tokens of its sequence) / (number of correct sequences)
    tokens_B = torch.tensor([3, 1, 2, 4, 1])
    expected_T = (1 / (4 * tokens_B))[batch.sequence_T]
    assert torch.allclose(over["correct"][trained_T], expected_T[trained_T])


def test_nothing_correct_weighs_nothing() -> None:
    batch = pack([trajectory(0, 0.0, ((2, 3),))])
    for average_over in ("all", "kept", "correct"):
        assert weights_of(batch, train_on="correct", level="sequence", average_over=average_over) == [0]


def test_reinforce_is_reward_minus_group_mean(batch: TokenBatch) -> None:
    advantage_T = reinforce(batch, global_norm=False, norm_var=False)
    by_sequence = [advantage_T[batch.sequence_T == b].max().item() for b in range(5)]
    assert by_sequence == pytest.approx([0.5, 0.0, 0, 0, 0])
    assert advantage_T[batch.sequence_T == 1].min() == -0.5
    assert not advantage_T[~batch.action_T].any()


def test_reinforce_over_the_whole_rollout(batch: TokenBatch) -> None:
    advantage_T = reinforce(batch, global_norm=True, norm_var=True)
    # rewards 1, 0, 1, 1: mean 3/4, deviation 1/2 (3/4 over n - 1 = 3)
    assert advantage_T[batch.action_T & (batch.sequence_T == 3)].tolist() == pytest.approx([0.5] * 4, rel=1e-5)
    assert advantage_T[batch.action_T & (batch.sequence_T == 1)].tolist() == pytest.approx([-1.5], rel=1e-5)


def test_groups_of_one_compare_with_the_rollout() -> None:
    batch = pack([trajectory(g, float(g == 0), ((1, 1),)) for g in range(4)])
    assert reinforce(batch, global_norm=False, norm_var=False).tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_spo_advantage_is_the_reward(batch: TokenBatch) -> None:
    assert spo(batch)[batch.action_T].tolist() == [1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_plan_covers_everything_once_within_the_limit(num_ranks: int) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 60) for _ in range(101)]
    planned = plan(lengths, 100, num_ranks)
    assert len(planned) == num_ranks
    assert len({len(rank) for rank in planned}) == 1
    assert sorted(i for rank in planned for ids in rank for i in ids) == list(range(101))
    assert max(sum(lengths[i] for i in ids) for rank in planned for ids in rank) <= 100
    assert plan(lengths, 100, num_ranks) == planned


def test_plan_with_fewer_sequences_than_ranks_has_empty_microbatches() -> None:
    assert sorted(plan([5], 10, 3)) == [[[]], [[]], [[0]]]
    assert plan([], 10, 2) == [[[]], [[]]]


def test_plan_names_the_override_for_a_sequence_that_is_too_long() -> None:
    with pytest.raises(ValueError, match=r"12 tokens does not fit into a microbatch of 10; raise actor.max_length"):
        plan([3, 11], 10, 1)


def round_costs(lengths: list[int], planned: list[list[list[int]]]) -> list[list[float]]:
    """[microbatch][rank] -> cost"""
    return [[sum(cost(lengths[i]) for i in ids) for ids in of_ranks] for of_ranks in zip(*planned, strict=True)]


def test_plan_balances_attention_and_not_tokens_alone() -> None:
    """16,384 tokens in one sequence cost two of the linear part: as much as 30 sequences of 1,000, not as 16."""
    assert cost(16_384) == 2 * 16_384
    lengths = [16_384] + [1_000] * 46
    first, second = plan(lengths, 40_000, 2)
    assert len(first) == 1
    costs = [sum(cost(lengths[i]) for i in rank[0]) for rank in (first, second)]
    assert max(costs) / min(costs) < 1.04
    tokens = [sum(lengths[i] for i in rank[0]) for rank in (first, second)]
    assert max(tokens) / min(tokens) > 1.15


def test_what_costs_much_meets_its_like() -> None:
    """Ranks meet in every microbatch: two sequences that fill one alone are computed at the same time."""
    lengths = [9_000, 9_000] + [500] * 20
    planned = plan(lengths, 10_000, 2)
    rounds = round_costs(lengths, planned)
    assert {0, 1} == {i for rank in planned for i in rank[0] if lengths[i] == 9_000}
    assert all(max(of_ranks) < 1.1 * min(of_ranks) for of_ranks in rounds)


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_plan_is_even_where_it_can_be(num_ranks: int) -> None:
    """Long tails: ranks wait less than 5% of a step, if the limit of tokens leaves the longest company."""
    draw = random.Random(num_ranks)
    lengths = [min(16_000, 50 + int(draw.lognormvariate(6.9, 1))) for _ in range(48 * num_ranks)]
    planned = plan(lengths, 40_000, num_ranks)
    assert max(sum(lengths[i] for i in ids) for rank in planned for ids in rank) <= 40_000
    rounds = round_costs(lengths, planned)
    assert sum(map(max, rounds)) <= 1.05 * sum(map(sum, rounds)) / num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_the_two_of_a_pair_stay_together(num_ranks: int) -> None:
    """Also where ranks have nothing to do: the losses of pairs compare them."""
    batch = pack([trajectory(n // 2, 1.0, ((3, 8 + n),)) for n in range(6)])
    planned = microbatches(batch, range(6), 50, num_ranks)
    assert all(b ^ 1 in ids for rank in planned for ids in rank for b in ids)


def test_minibatches_keep_trajectories_whole(batch: TokenBatch) -> None:
    assert minibatches(batch, 1) == [[0, 1, 2, 3, 4]]
    assert minibatches(batch, 2) == [[0, 1], [2, 3, 4]]
    assert minibatches(batch, 9) == [[0], [1], [2, 3], [4]]


def test_groups_stay_together_as_far_as_they_fit(batch: TokenBatch) -> None:
    assert batch.group_B.tolist() == [0, 0, 1, 1, 1]
    assert units(batch, range(5), 100) == [[0, 1], [2, 3, 4]]
    assert units(batch, [4, 0, 3, 1], 100) == [[4, 3], [0, 1]]
    assert units(batch, range(5), 6) == [[0, 1], [2], [3], [4]]  # 4 + 2, 2 + 6 > 6, 6 + 1 > 6
    planned = microbatches(batch, [0, 1, 3, 4], 7, 2)
    assert sorted(sorted(ids) for rank in planned for ids in rank) == [[0, 1], [3, 4]]


def test_what_sequences_share_is_found() -> None:
    """Two of a group begin with 1 2 3; one of another group does so by chance; one of the group does not."""
    ids = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 4, 5], [7, 2, 3]]
    groups = [0, 0, 1, 0]
    trajectories = [
        Trajectory(0, group, 0, [Sequence(i, [False] + [True] * (len(i) - 1), [0.0] * len(i), [0.0] * len(i))])
        for i, group in zip(ids, groups, strict=True)
    ]
    batch = pack(trajectories)
    shared = batch.shared()
    assert shared is not None
    # inputs: 1 2 3 4 | 1 2 3 | 1 2 3 4 | 7 2
    assert shared.distinct_U.tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12]
    assert shared.place_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert batch.token_ids_T[shared.distinct_U][shared.place_T].tolist() == batch.token_ids_T.tolist()
    assert pack(trajectories[2:]).shared() is None
