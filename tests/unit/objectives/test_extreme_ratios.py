"""Losses and gradients of every objective and term where a ratio of probabilities overflows or underflows float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from RL2.batch.packing import pack
from RL2.config.load import load
from RL2.objectives.loss import by_token, importance_weight, kl_estimate
from RL2.objectives.objective import Objective
from RL2.objectives.preference import dpo, ipo
from RL2.objectives.registry import OBJECTIVES, configured
from RL2.ops.token_stats import reference_stats
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory

LOG_RATIOS = (-1e4, -200.0, -89.0, -50.0, -1.0, 0.0, 1.0, 50.0, 79.0, 89.0, 200.0, 1e4)
ADVANTAGES = (-2.0, 0.0, 0.5)
KNOBS: dict[str, dict[str, Any]] = {"ppo": {"dual_clip": 3.0}}
BASE: dict[str, dict[str, Any]] = {"dppo": {"ratio_max": 20.0}}
"""Knobs without which a constant ratio that overflows is multiplied by a log p near 0."""
REPRESENTABLE = 1e35
"""Float64 results above it are beyond float32, or nearly."""


def tokens() -> tuple[TokenBatch, Tensor]:
    """A sequence of one action for each log ratio and advantage, labels likely and impossible; logits in float64."""
    cases = [(ratio, advantage) for ratio in LOG_RATIOS for advantage in ADVANTAGES]
    sequence = Sequence([0, 1], [False, True], [0.0] * 2, [0.0, 1.0])
    batch = pack([Trajectory(n, n, 0, [sequence]) for n in range(len(cases))])
    g = torch.Generator().manual_seed(0)
    logits_TV = 8 * torch.randn(len(cases), 4, generator=g, dtype=torch.float64)
    ratio_T, advantage_T = torch.tensor(cases, dtype=torch.float64).unbind(-1)
    logp_T = logits_TV.log_softmax(-1)[:, 1]
    batch = batch.with_(old_logp_T=logp_T - ratio_T, advantage_T=advantage_T, ref_logp_T=logp_T + ratio_T)
    return batch, logits_TV


def run(objective: Objective, knobs: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Loss of each token and its gradient by every statistic, in float64."""
    batch, logits_TV = tokens()
    fields, top_k = objective.needs, 3 if objective.top_k else 0
    stats = vars(reference_stats(logits_TV, batch.labels_T, fields, top_k))
    leaves = {name: x.to(dtype).requires_grad_() if x.is_floating_point() else x for name, x in stats.items()}
    cast = {name: x.to(dtype) for name, x in batch.tensors().items() if x.is_floating_point()}
    loss_T, metrics = objective(TokenStats(**leaves), batch.with_(**cast), **knobs)
    assert all(x.isfinite().all() for x in metrics.values())
    wanted = [x for x in leaves.values() if x.requires_grad]
    grads = torch.autograd.grad(loss_T.sum(), wanted, allow_unused=True, materialize_grads=True)
    return loss_T.detach().double(), [grad.double() for grad in grads]


def assert_right(found: Tensor, exact: Tensor) -> None:
    """Equal where float32 can hold it; otherwise finite, of the right sign and as large as float32 goes."""
    assert found.isfinite().all()
    small = exact.abs() < REPRESENTABLE
    torch.testing.assert_close(found[small], exact[small], rtol=2e-3, atol=1e-6)
    assert (found[~small].sign() == exact[~small].sign()).all()
    assert (found[~small].abs() > REPRESENTABLE / 100).all()


CASES = [*((name, f, BASE.get(name, {})) for name, f in OBJECTIVES.items()), ("dpo", dpo, {}), ("ipo", ipo, {})]
CASES += [(f"{name} {knobs}", OBJECTIVES[name], knobs) for name, knobs in KNOBS.items()]


@pytest.mark.parametrize(("objective", "knobs"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_losses_and_gradients_are_finite_and_right(objective: Objective, knobs: dict[str, Any]) -> None:
    found, exact = run(objective, knobs, torch.float32), run(objective, knobs, torch.float64)
    assert_right(found[0], exact[0])
    for grad, exact_grad in zip(found[1], exact[1], strict=True):
        assert_right(grad, exact_grad)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_are_finite_and_right(estimator: Any) -> None:
    def of(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        d_T = torch.tensor(LOG_RATIOS, dtype=dtype)
        logp_T = torch.zeros_like(d_T).requires_grad_()
        kl_T = kl_estimate(logp_T, d_T, estimator)
        return kl_T.detach().double(), torch.autograd.grad(kl_T.sum(), logp_T)[0].double()

    finite = [d <= 700 for d in LOG_RATIOS]  # beyond, float64 has no reference either
    for found, exact in zip(of(torch.float32), of(torch.float64), strict=True):
        assert found.isfinite().all()
        assert_right(found[finite], exact[finite])


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("level", "mode"), [(x, y) for x in ("token", "sequence") for y in ("truncate", "mask")])
def test_importance_weights_of_long_sequences(level: Any, mode: Any, sign: int) -> None:
    """4,000 tokens that are 0.05 nats apart: their product is e^200 or e^-200."""
    sequence = Sequence([0] * 4001, [False] + [True] * 4000, [0.0] * 4001, [0.0] * 4001)
    batch = pack([Trajectory(0, 0, 0, [sequence])]).with_(engine_logp_T=torch.full((4000,), -1.0))
    weight_T = importance_weight(torch.full((4000,), -1 + sign * 0.05), batch, cap=2.0, level=level, mode=mode)
    ratio = torch.tensor(sign * (0.05 if level == "token" else 200.0), dtype=torch.float64).exp().item()
    expected = ratio if ratio <= 2 else (2.0 if mode == "truncate" else 0.0)
    assert weight_T.tolist() == pytest.approx([expected] * 4000, rel=1e-4)


@pytest.mark.parametrize("region", ["all", "above_half"])
def test_what_a_certain_token_asks_for_is_finite(region: str) -> None:
    """p / (1 - p) = e^150 at the mode, which the slope of log(1 - p) is."""
    required = "actor.model_name=m actor.max_length_per_device=8 train_data.path=x train_data.prompts_per_rollout=1"
    required += " rollout.env_path=x rollout.train_sampling_params.max_new_tokens=1 trainer.experiment_name=x"
    actor = load("spo_0p5", [*required.split(), f"actor.path.region={region}"]).actor
    sequence = Sequence([0, 1], [False, True], [0.0] * 2, [0.0, 1.0])
    batch = pack([Trajectory(0, 0, 0, [sequence])]).with_(weight_T=torch.ones(1))
    stats = TokenStats(logp=torch.zeros(1), log1mp=torch.full((1,), -150.0), entropy=torch.zeros(1))
    loss_T, asks_T = by_token(stats, batch, actor, configured(actor))
    assert loss_T.item() == pytest.approx(75 - 0.693147)
    assert asks_T.isfinite().all() and asks_T.item() < 0
