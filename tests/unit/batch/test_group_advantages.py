"""Baselines and weights of groups against their formulas, written out group by group."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean, pstdev

import pytest
import torch

from RL2.batch.advantages import reinforce
from RL2.batch.group_advantages import best_of_group, gpg, maxrl, opo, otb, pass_at_k, soft_value
from RL2.batch.packing import pack
from RL2.types import Sequence, TokenBatch, Trajectory

GROUPS = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0], [1.0, 1.0, 1.0], [0.5, -0.25, 2.0, 0.0]]
LENGTHS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3], [5, 8, 9, 7]]


def rollout() -> TokenBatch:
    """Trajectories with a prompt of two tokens and the reward on the last action."""
    return pack(
        [
            Trajectory(
                g,
                g,
                s,
                [Sequence([0] * (2 + n), [False] * 2 + [True] * n, [0.0] * (2 + n), [0.0] * (1 + n) + [reward])],
            )
            for g, (rewards, lengths) in enumerate(zip(GROUPS, LENGTHS, strict=True))
            for s, (reward, n) in enumerate(zip(rewards, lengths, strict=True))
        ]
    )


def by_group(advantage_T: torch.Tensor) -> list[list[float]]:
    """Return the advantage of each trajectory, which all of its actions have."""
    batch, found = rollout(), []
    for b in range(batch.num_sequences):
        (value,) = advantage_T[batch.action_T & (batch.sequence_T == b)].unique().tolist()
        found.append(value)
    assert not advantage_T[~batch.action_T].any()
    ends = torch.tensor([len(g) for g in GROUPS]).cumsum(0).tolist()
    return [found[end - len(g) : end] for g, end in zip(GROUPS, ends, strict=True)]


def approx(expected: list[list[float]]) -> list[object]:
    return [pytest.approx(group, rel=1e-6, abs=1e-7) for group in expected]


def test_maxrl_divides_by_the_mean() -> None:
    expected = [[(r - fmean(g)) / fmean(g) if fmean(g) > 0 else 0.0 for r in g] for g in GROUPS]
    found = by_group(maxrl(rollout()))
    assert found == approx(expected)
    # rewards of 0 and 1: the sum over responses of (A / n) is that of the mean over successes minus the mean over all
    successes = [1 / GROUPS[0].count(1.0) if r else 0.0 for r in GROUPS[0]]
    assert [a / 5 for a in found[0]] == pytest.approx([s - 1 / 5 for s in successes], rel=1e-6)


def test_opo_weighs_the_mean_by_length() -> None:
    expected = []
    for rewards, lengths in zip(GROUPS, LENGTHS, strict=True):
        mean = sum(r * n for r, n in zip(rewards, lengths, strict=True)) / sum(lengths)
        expected.append([r - mean for r in rewards])
    assert by_group(opo(rollout())) == approx(expected)


def test_gpg_counts_the_responses_with_a_gradient() -> None:
    informative = len(GROUPS[0]) + len(GROUPS[3])
    total = sum(map(len, GROUPS))
    expected = [[(r - fmean(g)) * total / informative if len(set(g)) > 1 else 0.0 for r in g] for g in GROUPS]
    assert by_group(gpg(rollout())) == approx(expected)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_pass_at_k_is_the_mean_over_all_subsets(k: int) -> None:
    expected = []
    for rewards in GROUPS:
        subsets = list(combinations(range(len(rewards)), min(k, len(rewards))))
        passed = [float(any(rewards[i] > 0 for i in subset)) for subset in subsets]
        mean, std = fmean(passed), pstdev(passed)
        expected.append(
            [
                fmean([(p - mean) / std for p, subset in zip(passed, subsets, strict=True) if i in subset])
                if std
                else 0.0
                for i in range(len(rewards))
            ]
        )
    assert by_group(pass_at_k(rollout(), k=k)) == approx(expected)
    assert sum(by_group(pass_at_k(rollout(), k=k))[0]) == pytest.approx(0, abs=1e-6)


def test_pass_at_1_is_grpo() -> None:
    """On rewards of 0 and 1, but for the deviation, which is that of the group and not an estimate from it."""
    grpo = by_group(reinforce(rollout()))[0]
    assert by_group(pass_at_k(rollout(), k=1))[0] == pytest.approx([a / pstdev(GROUPS[0]) for a in grpo], rel=1e-5)


def test_the_best_of_a_group_leads_the_second() -> None:
    assert by_group(best_of_group(rollout())) == approx([[0.0] * 5, [0.0] * 2, [0.0] * 3, [0.0, 0.0, 1.5, 0.0]])


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_soft_value_is_the_log_of_a_mean_of_exponentials(beta: float) -> None:
    expected = [[r - beta * math.log(fmean([math.exp(x / beta) for x in g])) for r in g] for g in GROUPS]
    assert by_group(soft_value(rollout(), beta=beta)) == approx(expected)


def test_otb_weighs_the_reward_to_come_by_the_energy_of_the_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    batch = rollout()
    # one-token-in-two steps also earn something, so that the reward to come changes within a response
    early_T = 0.5 * (torch.rand(len(batch.labels_T), generator=g) < 0.3) * batch.action_T
    logits_TV = torch.randn(len(batch.labels_T), 6, generator=g, dtype=torch.float64)
    p_TV = logits_TV.softmax(-1)
    batch = batch.with_(
        reward_T=batch.reward_T + early_T, old_logp_T=p_TV[:, 2].log(), old_sum_p2_T=p_TV.square().sum(-1)
    )
    # the squared norm of e_a - p
    energy_T = (torch.eye(6, dtype=torch.float64)[2] - p_TV).square().sum(-1)
    rows = [(energy_T[keep].tolist(), batch.reward_T[keep].tolist()) for keep in actions_of(batch)]
    found = [otb(batch)[keep].tolist() for keep in actions_of(batch)]
    start = 0
    for group in LENGTHS:
        members = rows[start : start + len(group)]
        for i, (energies, rewards) in enumerate(members):
            expected = []
            for t in range(len(energies)):
                alive = [(sum(e[: t + 1]), sum(r[t:])) for e, r in members if len(e) > t]
                baseline = sum(w * to_come for w, to_come in alive) / sum(w for w, _ in alive)
                expected.append(sum(rewards[t:]) - baseline)
            assert found[start + i] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        start += len(group)


def actions_of(batch: TokenBatch) -> list[torch.Tensor]:
    """Return a mask of the actions of each sequence."""
    return [batch.action_T & (batch.sequence_T == b) for b in range(batch.num_sequences)]


def test_soft_value_is_between_the_mean_and_the_maximum() -> None:
    mean, highest = by_group(soft_value(rollout(), beta=1e6)), by_group(soft_value(rollout(), beta=1e-6))
    assert mean == [pytest.approx(group, abs=1e-5) for group in by_group(reinforce(rollout()))]
    assert highest == [pytest.approx([r - max(g) for r in g], abs=1e-4) for g in GROUPS]
