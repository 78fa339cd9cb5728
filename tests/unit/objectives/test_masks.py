"""Masks against off-policy data, and the selections over a minibatch, against their formulas sequence by sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from RL2.batch.packing import kept, pack
from RL2.batch.selection import covariance
from RL2.config.load import load
from RL2.config.model import Actor, Masks
from RL2.errors import ConfigError
from RL2.objectives.loss import importance_weight, total_loss, with_weights
from RL2.objectives.masks import masks
from RL2.objectives.registry import configured
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory

LENGTHS = (4, 1, 7, 3)
ADVANTAGES = (1.0, -0.5, -2.0, 0.5)
GAPS = (0.002, -0.2, 0.03, 0.5)
"""Mean of log(p_old / p_engine) in each sequence."""
REQUIRED = """actor.model_name=m actor.max_length_per_device=64 train_data.path=x train_data.prompts_per_rollout=2
    rollout.env_path=x trainer.experiment_name=x rollout.train_sampling_params.max_new_tokens=8"""


def actor(*overrides: str) -> Actor:
    return load("ppo", [*REQUIRED.split(), *overrides]).actor


def rollout() -> tuple[Tensor, TokenBatch]:
    """Present log-probabilities, and a batch of actions whose engine differs by `GAPS` on average."""
    g = torch.Generator().manual_seed(0)
    sequences = [Sequence([0] * (n + 1), [False] + [True] * n, [0.0] * (n + 1), [0.0] * (n + 1)) for n in LENGTHS]
    batch = pack([Trajectory(n, n, 0, [sequence]) for n, sequence in enumerate(sequences)])
    old_T = -0.1 - torch.rand(sum(LENGTHS), generator=g, dtype=torch.float64)
    noise = [0.3 * torch.randn(n, generator=g, dtype=torch.float64) for n in LENGTHS]
    gap_T = torch.cat([x - x.mean() + gap for x, gap in zip(noise, GAPS, strict=True)])
    gap_T[-1] = math.log(1e-5)  # a token that the trainer holds nearly impossible
    logp_T = old_T - 0.05
    advantage_T = torch.tensor(ADVANTAGES, dtype=torch.float64)[batch.sequence_T]
    return logp_T, batch.with_(old_logp_T=old_T, engine_logp_T=old_T - gap_T, advantage_T=advantage_T)


def by_sequence(x_T: Tensor) -> list[list[float]]:
    return [x.tolist() for x in x_T.split(LENGTHS)]


def of(config: Masks) -> dict[str, list[list[float]]]:
    logp_T, batch = rollout()
    assert batch.old_logp_T is not None
    return {name: by_sequence(mask_T) for name, mask_T in masks(logp_T, batch.old_logp_T, batch, config)}


def test_masks_leave_whole_sequences_out() -> None:
    logp_T, batch = rollout()
    assert batch.old_logp_T is not None and batch.engine_logp_T is not None
    gaps = (batch.old_logp_T - batch.engine_logp_T).split(LENGTHS)
    now = (batch.engine_logp_T - logp_T).split(LENGTHS)
    expected = {
        "geometric": [float(0.9 <= math.exp(x.mean()) <= 1.02) for x in gaps],
        "veto": [float(min(math.exp(v) for v in x.tolist()) >= 1e-4) for x in gaps],
        "stale": [float(not (x.mean() > 0.1 and a < 0)) for x, a in zip(now, ADVANTAGES, strict=True)],
    }
    found = of(Masks(geometric_low=0.9, geometric_high=1.02, veto=1e-4, stale_kl=0.1))
    assert found == {name: [[x] * n for x, n in zip(kept, LENGTHS, strict=True)] for name, kept in expected.items()}
    assert {sum(kept) for kept in expected.values()} <= {1.0, 2.0, 3.0}  # each mask leaves some out, and not all


def test_without_masks_nothing_is_left_out() -> None:
    assert of(Masks()) == {}
    assert not Masks().is_on
    everything = [[1.0] * n for n in LENGTHS]
    assert of(Masks(geometric_high=1e9, stale_kl=1e9)) == {"geometric": everything, "stale": everything}


def test_masks_multiply_the_objective_and_have_a_metric_each() -> None:
    logp_T, batch = rollout()
    logp_T.requires_grad_()
    stats = TokenStats(logp=logp_T, entropy=torch.ones_like(logp_T))
    settings = ("actor.masks.geometric_high=1.02", "actor.masks.stale_kl=0.1", "actor.tis_coef=0")
    plain, masked = (
        total_loss(stats, batch, config, configured(config)) for config in (actor("actor.tis_coef=0"), actor(*settings))
    )
    keep_T = torch.ones_like(logp_T)
    for name, rows in of(actor(*settings).masks).items():
        mask_T = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
        torch.testing.assert_close(masked[1][f"masked_{name}"], 1 - mask_T)
        keep_T = keep_T * mask_T
    torch.testing.assert_close(masked[0], plain[0] * keep_T)
    assert 0 < keep_T.mean() < 1
    (grad_T,) = torch.autograd.grad(masked[0].sum(), logp_T)
    assert not grad_T[keep_T == 0].any()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_have_two_bounds(level: Any, mode: Any) -> None:
    """IcePop is `mask` on tokens; a ratio within the bounds is the weight."""
    _, batch = rollout()
    assert batch.old_logp_T is not None and batch.engine_logp_T is not None
    expected: list[float] = []
    for gaps in (batch.old_logp_T - batch.engine_logp_T).split(LENGTHS):
        whole = {"sequence": gaps.sum(), "geometric": gaps.mean()}
        for gap in gaps:
            ratio = math.exp(gap if level == "token" else whole[level])
            bounded = min(max(ratio, 0.8), 1.3)
            expected.append(bounded if mode == "truncate" or bounded == ratio else 0.0)
    found_T = importance_weight(batch.old_logp_T, batch, cap=1.3, level=level, mode=mode, low=0.8)
    assert found_T.tolist() == pytest.approx(expected, rel=1e-9)
    assert 0 < (found_T > 0).double().mean() <= 1


def test_the_second_moment_of_the_kept_tokens_is_limited() -> None:
    _, batch = rollout()
    assert batch.old_logp_T is not None and batch.engine_logp_T is not None
    square = ((batch.old_logp_T - batch.engine_logp_T) ** 2).tolist()
    left, limit = sorted(square), 0.04
    while sum(left) / len(left) > limit:  # the largest first
        left.pop()
    kept_T = kept(batch, train_on="all", second_moment=limit)
    assert sorted(x for x, is_kept in zip(square, kept_T.tolist(), strict=True) if is_kept) == left
    assert 0 < len(left) < len(square)
    assert kept(batch, train_on="all", second_moment=1e9).all()
    assert not kept(batch, train_on="all", second_moment=0.0).any()


def test_clip_cov_draws_tokens_of_a_high_covariance() -> None:
    _, batch = rollout()
    assert batch.old_logp_T is not None and batch.advantage_T is not None
    logp, advantage = batch.old_logp_T.tolist(), batch.advantage_T.tolist()
    means = sum(logp) / len(logp), sum(advantage) / len(advantage)
    expected = [(x - means[0]) * (a - means[1]) for x, a in zip(logp, advantage, strict=True)]
    covariance_T = covariance(batch, batch.action_T)
    assert covariance_T.tolist() == pytest.approx(expected)
    rank_T = with_weights(batch, actor("actor.objective=kl_cov")).covariance_rank_T
    assert rank_T is not None
    higher = [sum(other > own for other in expected) / len(expected) for own in expected]
    assert rank_T.tolist() == pytest.approx(higher)
    assert with_weights(batch, actor()).covariance_rank_T is None

    knobs: dict[str, Any] = {"covariance_share": 0.2, "covariance_low": 0.0, "covariance_high": 0.4}
    dropped_T = ~kept(batch, train_on="all", **knobs)
    assert dropped_T.sum() == int(0.2 * len(logp))
    assert ((covariance_T[dropped_T] > 0) & (covariance_T[dropped_T] < 0.4)).all()
    assert torch.equal(dropped_T, ~kept(batch, train_on="all", **knobs))
    assert kept(batch, train_on="all", covariance_share=0.2, covariance_low=8.0, covariance_high=9.0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("actor.tis_low=3",), r"actor\.tis_low=3\.0 is above actor\.tis_coef=2\.0"),
        (("actor.tis_coef=0", "actor.tis_low=0.5"), r"tis_low have no effect with actor\.tis_coef=0"),
        (("actor.select.covariance_low=0",), r"have no effect with actor\.select\.covariance_share=0"),
        (
            ("actor.select.covariance_share=0.1", "actor.select.covariance_low=6"),
            r"covariance_low=6 must be below actor\.select\.covariance_high=5",
        ),
        (
            ("actor.tis_coef=0", "actor.masks.veto=0.1", "rollout.train_sampling_params.top_p=0.9"),
            r"actor\.masks compares with the engine's distribution, which top_p, top_k or min_p",
        ),
        (("actor.masks.geometric_high=0.5",), r"actor\.masks\.geometric_high=0\.5; must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        actor(*settings)
