"""Losses on pairs against formulas written out for one pair at a time, in float64, with their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from RL2.batch.packing import pack, sequence_weights
from RL2.objectives.objective import Loss
from RL2.objectives.preference import bradley_terry, dpo, ipo
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory

LENGTHS = ((3, 1), (5, 5), (2, 7))
"""Response tokens of chosen and rejected."""
PROMPT = 4


def packed(lengths: tuple[tuple[int, int], ...] = LENGTHS) -> TokenBatch:
    trajectories = []
    for n, pair in enumerate(lengths):
        for side, length in enumerate(pair):
            mask = [False] * PROMPT + [True] * length
            zeros = [0.0] * len(mask)
            rewards = [*zeros[1:], float(side == 0)]
            trajectories.append(Trajectory(n, n, side, [Sequence([1] * len(mask), mask, zeros, rewards)]))
    batch = pack(trajectories)
    return batch.with_(weight_T=sequence_weights(batch))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(name: str, h_c: float, h_r: float, beta: float, smoothing: float) -> tuple[float, float, float]:
    """Loss, and its derivatives by h_c and h_r."""
    if name == "ipo":
        distance = h_c - h_r - 1 / (2 * beta)
        return distance**2, 2 * distance, -2 * distance
    margin = beta * (h_c - h_r)
    loss = -(1 - smoothing) * math.log(sigmoid(margin)) - smoothing * math.log(sigmoid(-margin))
    slope = -beta * (sigmoid(-margin) - smoothing)
    return loss, slope, -slope


def total(loss: Callable[[TokenStats, TokenBatch], Loss], stats: TokenStats, actions: TokenBatch) -> Tensor:
    loss_T, _ = loss(stats, actions)
    assert actions.weight_T is not None
    return (loss_T * actions.weight_T).sum()


@pytest.mark.parametrize(
    ("name", "beta", "smoothing"), [("dpo", 0.1, 0.0), ("dpo", 0.5, 0.2), ("dpo", 2.0, 0.0), ("ipo", 0.1, 0.0)]
)
@pytest.mark.parametrize("reference", [True, False])
def test_policy_losses_are_their_formulas(name: str, beta: float, smoothing: float, reference: bool) -> None:
    batch = packed()
    actions = batch.positions(batch.action_T)
    g = torch.Generator().manual_seed(0)
    logp_T = -3 * torch.rand(len(actions.labels_T), generator=g, dtype=torch.float64)
    ref_T = -3 * torch.rand(len(actions.labels_T), generator=g, dtype=torch.float64) * reference
    actions = actions.with_(ref_logp_T=ref_T)
    logp_T.requires_grad_()
    loss = partial(ipo, beta=beta) if name == "ipo" else partial(dpo, beta=beta, label_smoothing=smoothing)
    ours = total(loss, TokenStats(logp=logp_T), actions)
    ours.backward()

    expected, gradient, at = 0.0, [], 0
    rewards: list[tuple[float, float]] = []
    for chosen, rejected in LENGTHS:
        ratios = (logp_T - ref_T).tolist()[at : at + chosen + rejected]
        at += chosen + rejected
        sums = sum(ratios[:chosen]), sum(ratios[chosen:])
        counts = (chosen, rejected) if name == "ipo" else (1, 1)
        value, by_c, by_r = by_hand(name, sums[0] / counts[0], sums[1] / counts[1], beta, smoothing)
        expected += value / len(LENGTHS)
        gradient += [by_c / counts[0] / len(LENGTHS)] * chosen + [by_r / counts[1] / len(LENGTHS)] * rejected
        rewards.append((beta * sums[0], beta * sums[1]))
    assert ours.item() == pytest.approx(expected, rel=1e-6)
    assert logp_T.grad is not None
    assert logp_T.grad.tolist() == pytest.approx(gradient, rel=1e-6)

    _, metrics = loss(TokenStats(logp=logp_T), actions)
    assert actions.weight_T is not None
    means = {key: x[actions.weight_T != 0].mean().item() for key, x in metrics.items()}
    assert means == pytest.approx(
        {
            "reward_chosen": sum(c for c, _ in rewards) / 3,
            "reward_rejected": sum(r for _, r in rewards) / 3,
            "margin": sum(c - r for c, r in rewards) / 3,
            "accuracy": sum(c > r for c, r in rewards) / 3,
        }
    )


def test_bradley_terry_is_its_formula() -> None:
    actions = packed(((1, 1),) * 3)
    actions = actions.positions(actions.action_T)
    value_T = torch.tensor([0.3, -1.2, 2.0, 2.5, -30.0, 30.0], dtype=torch.float64, requires_grad=True)
    ours = total(bradley_terry, TokenStats(value=value_T), actions)
    ours.backward()
    margins = [1.5, -0.5, -60.0]
    assert ours.item() == pytest.approx(sum(-math.log(sigmoid(m)) for m in margins) / 3, rel=1e-6)
    slopes = [x for m in margins for x in (-sigmoid(-m) / 3, sigmoid(-m) / 3)]
    assert value_T.grad is not None
    assert value_T.grad.tolist() == pytest.approx(slopes, rel=1e-6)
    _, metrics = bradley_terry(TokenStats(value=value_T), actions)
    assert metrics["margin"].tolist() == pytest.approx([m for m in margins for _ in range(2)])
    assert metrics["accuracy"].tolist() == [1, 1, 0, 0, 0, 0]


def test_the_order_of_sequences_does_not_matter() -> None:
    batch = packed()
    batch = batch.with_(ref_logp_T=torch.zeros_like(batch.reward_T))
    logp_T = torch.rand(len(batch.labels_T), generator=torch.Generator().manual_seed(1)).neg()
    batch = batch.with_(old_logp_T=logp_T)  # carried along
    order = [5, 0, 3, 4, 1, 2]
    results = []
    for actions in (batch.positions(batch.action_T), batch.sequences(order)):
        actions = actions.positions(actions.action_T)
        assert actions.old_logp_T is not None
        results.append(total(dpo, TokenStats(logp=actions.old_logp_T), actions).item())
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] != pytest.approx(math.log(2), rel=1e-3)


@pytest.mark.parametrize("loss", [dpo, ipo])
def test_a_sequence_without_its_partner_is_harmless(loss: Callable[[TokenStats, TokenBatch], Loss]) -> None:
    """What an idle process computes: a loss of weight 0 must not be infinite."""
    alone = packed().sequences([1])
    actions = alone.positions(alone.action_T).with_(ref_logp_T=torch.zeros(1), weight_T=torch.zeros(1))
    logp_T = torch.tensor([-1e4], requires_grad=True)
    ours = total(loss, TokenStats(logp=logp_T), actions)
    ours.backward()
    assert ours.item() == 0
    assert logp_T.grad is not None
    assert logp_T.grad.tolist() == [0]


def test_every_sequence_weighs_the_same_at_its_last_action() -> None:
    batch = packed()
    assert batch.weight_T is not None
    places = batch.weight_T.nonzero()[:, 0]
    assert places.tolist() == (batch.cu_seqlens[1:] - 1).tolist()
    assert batch.weight_T[places].tolist() == pytest.approx([1 / 6] * 6)
    # a sequence may end with tokens that are no action
    cut = batch.action_T.clone()
    cut[batch.cu_seqlens[1] - 1] = False
    moved = sequence_weights(batch.with_(action_T=cut)).nonzero()[:, 0].tolist()
    assert moved == [places[0] - 1, *places[1:].tolist()]
