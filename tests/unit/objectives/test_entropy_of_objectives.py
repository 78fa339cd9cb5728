"""What docs/objectives.md says about entropy: the first-order change by a step on the logits of one token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from RL2.batch.packing import pack
from RL2.objectives.registry import bind
from RL2.ops.token_stats import reference_stats
from RL2.types import Sequence, Trajectory

N = 1000
"""Distributions of each vocabulary size."""
SIZES = range(3, 23)
ROUNDING = 1e-13


def distributions() -> list[Tensor]:
    """[N, V] logits, from flat to peaked."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(N, v, generator=g).double() * 6 * torch.rand(N, 1, generator=g).double() for v in SIZES]


def change(name: str, knobs: dict[str, Any], logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    """[T]: of the entropy, by a small step against the gradient, as a multiple of the step."""
    sequence = Sequence([0] * (N + 1), [False] + [True] * N, [0.0] * (N + 1), [0.0] * (N + 1))
    batch = pack([Trajectory(0, 0, 0, [sequence])]).with_(labels_T=labels_T)
    bound, leaf_TV = bind(name, knobs), logits_TV.clone().requires_grad_()
    stats = reference_stats(leaf_TV, labels_T, (*bound.fields, "entropy"), bound.top_k)
    (grad_TV,) = torch.autograd.grad(bound.loss(stats, batch)[0].sum(), leaf_TV, retain_graph=True)
    (entropy_grad_TV,) = torch.autograd.grad(stats.entropy.sum(), leaf_TV)
    return -(grad_TV * entropy_grad_TV).sum(-1)


def changes(name: str, knobs: dict[str, Any], which: str) -> Tensor:
    """Of the sampled tokens that are `which`, over all distributions."""
    found = []
    for seed, logits_TV in enumerate(distributions()):
        g = torch.Generator().manual_seed(seed)
        any_T = torch.randint(0, logits_TV.shape[1], (N,), generator=g)
        labels_T = logits_TV.argmax(-1) if which == "mode" else any_T
        stats = reference_stats(logits_TV, labels_T, ("logp", "entropy", "rank"))
        rare_T = stats.logp < -stats.entropy
        kept_T = {"rare": rare_T, "not rare": ~rare_T, "second": stats.rank == 2}.get(which, torch.ones(N).bool())
        found.append(change(name, knobs, logits_TV, labels_T)[kept_T])
    return torch.cat(found)


DETACHED = {"detach_target": True}


@pytest.mark.parametrize(
    ("name", "knobs", "which"),
    [
        ("positive_ce", {}, "rare"),
        ("spo", {}, "any"),
        ("spo", DETACHED, "rare"),
        ("binary_jsd", {}, "any"),
        ("binary_jsd", DETACHED, "rare"),
        ("spo_0p5", {}, "any"),
        ("rank_kl", {}, "second"),
        ("rank_kl", {}, "not rare"),
        ("rank_jsd", {}, "second"),
        ("rank_jsd", {}, "not rare"),
    ],
)
def test_entropy_does_not_fall(name: str, knobs: dict[str, Any], which: str) -> None:
    found = changes(name, knobs, which)
    assert found.max() > 1e-3
    assert found.min() > -ROUNDING


@pytest.mark.parametrize(
    ("name", "knobs", "which"),
    [
        ("spo", DETACHED, "not rare"),
        ("binary_jsd", DETACHED, "not rare"),
        ("rank_kl", {}, "rare"),
        ("rank_jsd", {}, "rare"),
    ],
)
def test_entropy_can_fall(name: str, knobs: dict[str, Any], which: str) -> None:
    found = changes(name, knobs, which)
    assert found.min() < -1e-4
    assert found.max() > 1e-3


def test_raising_the_mode_lowers_the_entropy() -> None:
    found = changes("positive_ce", {}, "mode")
    assert found.min() < -1e-3
    assert found.max() < ROUNDING


@pytest.mark.parametrize("knobs", [{}, {"region": "all"}])
def test_pushing_a_likely_token_down_raises_the_entropy(knobs: dict[str, Any]) -> None:
    logits_TV = distributions()[5]
    p_m, labels_T = logits_TV.softmax(-1).max(-1)
    found = change("spo_0p5", knobs, logits_TV, labels_T)[p_m > 0.5]
    assert found.min() > -ROUNDING
    assert found.max() > 1e-3


def test_reinforce_changes_it_by_minus_a_covariance() -> None:
    """Over tokens drawn from p: of the advantage and p_a (log p_a + H)."""
    g = torch.Generator().manual_seed(1)
    logits_V = torch.randn(9, generator=g).double().requires_grad_()
    p_V, advantage_V = logits_V.softmax(-1), torch.randn(9, generator=g).double()
    entropy = -(p_V * p_V.log()).sum()
    (entropy_grad_V,) = torch.autograd.grad(entropy, logits_V, retain_graph=True)
    expected_loss = -(p_V.detach() * advantage_V * p_V.log()).sum()
    (grad_V,) = torch.autograd.grad(expected_loss, logits_V, retain_graph=True)
    x_V = (p_V * (p_V.log() + entropy)).detach()
    mean = (p_V.detach() * advantage_V).sum()
    covariance = (p_V.detach() * (advantage_V - mean) * x_V).sum()
    torch.testing.assert_close(-(grad_V * entropy_grad_V).sum(), -covariance)
