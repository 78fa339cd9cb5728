"""The critic's loss against its formula, token by token in float64, with its gradient; what the critic reports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from RL2.batch.packing import pack
from RL2.objectives.value import clipped_value
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory
from RL2.workers.critic import explained_variance


def a_batch(old_T: Tensor, return_T: Tensor) -> TokenBatch:
    """One sequence of actions only."""
    n = len(old_T)
    zeros = [0.0] * (n + 1)
    batch = pack([Trajectory(0, 0, 0, [Sequence([0] * (n + 1), [False] + [True] * n, zeros, zeros)])])
    return batch.with_(value_T=old_T, return_T=return_T)


@pytest.mark.parametrize("clip", [0.2, 1.0, 100.0])
def test_value_loss_and_gradient_are_the_formula(clip: float) -> None:
    g = torch.Generator().manual_seed(0)
    old_T, return_T, moved_T = (torch.randn(400, generator=g, dtype=torch.float64) for _ in range(3))
    value_T = (old_T + moved_T).requires_grad_()
    loss_T, metrics = clipped_value(TokenStats(value=value_T), a_batch(old_T, return_T), clip=clip)
    (gradient_T,) = torch.autograd.grad(loss_T.sum(), value_T)

    blocked = 0
    for t, (v, before, target) in enumerate(zip(value_T.tolist(), old_T.tolist(), return_T.tolist(), strict=True)):
        clamped = min(max(v, before - clip), before + clip)
        stays = abs(clamped - target) > abs(v - target)  # it may not be drawn nearer to the return
        blocked += stays
        assert loss_T[t].item() == pytest.approx(max((v - target) ** 2, (clamped - target) ** 2) / 2, rel=1e-12)
        assert gradient_T[t].item() == pytest.approx(0 if stays else v - target, rel=1e-9)
        assert bool(metrics["clipped"][t]) == stays
    assert (blocked > 0) == (clip < 100)


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(a_batch(returns, returns))["explained_variance"] == 1
    assert explained_variance(a_batch(torch.full((4,), 7.0), returns))["explained_variance"] == 0
    assert explained_variance(a_batch(-returns, returns))["explained_variance"] == -3
    assert explained_variance(a_batch(returns, torch.ones(4))) == {}  # nothing to explain
