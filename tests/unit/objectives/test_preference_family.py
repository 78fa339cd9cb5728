"""Equivalences that the papers of preference losses claim, and what each loss refuses or needs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from RL2.batch.packing import pack
from RL2.config.load import load
from RL2.errors import ConfigError
from RL2.objectives.registry import PREFERENCES, BoundObjective, bind, preference
from RL2.objectives.unpaired import bco, kto
from RL2.tools.check_objective.subject import synthetic_batch
from RL2.trainer.unused_settings import check_preference
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory

WHOLE = synthetic_batch(16).preferences().batch


def gradient(name: str, batch: TokenBatch = WHOLE, **knobs: Any) -> Tensor:
    """Derivative by log p of every token, of the sum over tokens."""
    g = torch.Generator().manual_seed(3)
    logp_T = (-3 * torch.rand(len(batch.labels_T), generator=g, dtype=torch.float64)).requires_grad_()
    loss_T, _ = PREFERENCES[name](TokenStats(logp=logp_T), batch, **knobs)
    return torch.autograd.grad(loss_T.sum(), logp_T)[0]


def alike(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_dpo_is_the_limit_of_the_others() -> None:
    dpo = gradient("sigmoid")
    assert alike(gradient("robust", label_smoothing=0.0), dpo)
    assert alike(gradient("sigmoid", divergence="alpha", alpha=1.0), dpo)
    assert not alike(gradient("sigmoid", ld_alpha=0.5), dpo)
    free = WHOLE.with_(ref_logp_T=torch.zeros_like(WHOLE.reward_T))
    assert alike(gradient("cpo", free, nll_coef=0.0), gradient("sigmoid", free))


def test_the_alpha_divergence_at_0_is_the_forward_one() -> None:
    assert alike(gradient("sigmoid", divergence="alpha", alpha=0.0), gradient("sigmoid", divergence="forward_kl"))


def test_simpo_without_a_margin_is_length_normalised_dpo_without_a_reference() -> None:
    free = WHOLE.with_(ref_logp_T=torch.zeros_like(WHOLE.reward_T))
    assert alike(gradient("simpo", free, beta=0.7, gamma=0.0), gradient("sigmoid_norm", free, beta=0.7))


def test_kto_at_a_baseline_of_0_is_apo_zero() -> None:
    at_zero = WHOLE.with_(baseline_T=torch.zeros_like(WHOLE.reward_T))
    assert alike(gradient("kto", at_zero), gradient("apo_zero_unpaired", WHOLE))
    assert not alike(gradient("kto", WHOLE), gradient("apo_zero_unpaired", WHOLE))


def test_kto_with_one_class_pushes_one_way() -> None:
    bad = WHOLE.with_(reward_T=torch.zeros_like(WHOLE.reward_T))
    assert (gradient("kto", bad) > 0).all()  # a step against it lowers every response
    assert (gradient("bco", bad) > 0).all()
    assert not gradient("kto", bad, undesirable_weight=0.0).any()


def test_exo_vanishes_where_dpo_has_label_smoothing() -> None:
    """Both are zero at s(beta m) = 1 - e, one a divergence in each direction."""
    batch = WHOLE.sequences([0, 1])
    n = len(batch.labels_T)
    margin = torch.log(torch.tensor(0.8 / 0.2, dtype=torch.float64))
    logp_T = torch.zeros(n, dtype=torch.float64)
    logp_T[batch.sequence_T == 1] = -margin / (batch.sequence_T == 1).sum()
    logp_T.requires_grad_()
    free = batch.with_(ref_logp_T=torch.zeros(n, dtype=torch.float64))
    for name in ("sigmoid", "exo_pair"):
        loss_T, _ = PREFERENCES[name](TokenStats(logp=logp_T), free, beta=1.0, label_smoothing=0.2)
        assert torch.autograd.grad(loss_T.sum(), logp_T)[0].abs().max() < 1e-12


REQUIRED = """actor.model_name=m actor.max_length_per_device=64 data.path=x data.max_length=64
    trainer.experiment_name=x"""


def bound(*overrides: str) -> BoundObjective:
    return preference(load("dpo", [*REQUIRED.split(), *overrides]).actor)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("actor.loss=nope", "actor.loss=nope; choose one of sigmoid, ipo"),
        (
            "actor.loss=ipo actor.label_smoothing=0.1",
            "actor.label_smoothing has no effect: actor.loss=ipo does not read it; its knobs are beta",
        ),
        ("actor.loss=ipo actor.loss_args.gamma=1", "actor.loss_args.gamma has no effect: actor.loss=ipo"),
        ("actor.loss_args.ld_alpha=2", "actor.loss_args.ld_alpha=2; must be at least 0 and at most 1"),
        (
            "actor.loss=simpo actor.reference_free=true",
            "actor.reference_free=true has no effect: actor.loss=simpo reads no reference",
        ),
        ("actor.loss=kto actor.reference_free=true", "actor.loss=kto compares with a reference"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        bound(*overrides.split())


def test_a_reference_that_is_not_read_is_refused() -> None:
    other = "ref_actor.model_name=other"
    check_preference(load("dpo", [*REQUIRED.split(), other]))
    with pytest.raises(ConfigError, match=r"ref_actor.model_name=other has no effect: actor.loss=simpo reads no"):
        check_preference(load("dpo", [*REQUIRED.split(), other, "actor.loss=simpo"]))


def test_a_loss_has_its_own_defaults() -> None:
    assert bound().knobs["beta"] == 0.1
    assert bound("actor.loss=simpo").knobs == {"beta": 2.0, "gamma": 1.0, "nll_coef": 0.0}
    assert bound("actor.loss=simpo", "actor.beta=0.5").knobs["beta"] == 0.5
    assert {name for name, loss in PREFERENCES.items() if not loss.reference} == {"cpo", "simpo", "orpo"}
    labels = {name for name, loss in PREFERENCES.items() if loss.trains_on == "labels"}
    assert labels == {"kto", "bco", "apo_zero_unpaired"}


def test_other_programs_refuse_losses_of_preferences() -> None:
    with pytest.raises(ConfigError, match="trains on responses with a label; use the program dpo"):
        bind("kto", {})


def test_metrics_are_those_of_the_response() -> None:
    logp_T = torch.full((len(WHOLE.labels_T),), -0.5, dtype=torch.float64)
    _, metrics = kto(TokenStats(logp=logp_T), WHOLE, beta=0.1)
    h = float((logp_T - WHOLE.ref_logp_T)[WHOLE.sequence_T == 0].sum())
    assert metrics["reward"][0].item() == pytest.approx(0.1 * h)
    assert metrics["accuracy"][0].item() == float(h > 0.4)
    assert bco.reference


def test_pivotal_is_dpo_where_the_responses_part() -> None:
    """The gradient is that of `sigmoid` on pairs of these two tokens, and 0 elsewhere."""
    sequences = [([1, 2, 3, 4], 1.0), ([1, 2, 5], 0.0), ([6], 1.0), ([7, 8], 0.0), ([1, 2], 1.0), ([1, 2], 0.0)]
    trajectories = [
        Trajectory(n, n // 2, n % 2, [Sequence([0, *ids], [False] + [True] * len(ids), [0.0] * (len(ids) + 1),
                                               [0.0] * len(ids) + [reward])])
        for n, (ids, reward) in enumerate(sequences)
    ]  # fmt: skip
    batch = pack(trajectories)
    logp_T = torch.linspace(-2, -0.1, len(batch.labels_T), dtype=torch.float64).requires_grad_()
    loss_T, _ = PREFERENCES["pivotal"](TokenStats(logp=logp_T), batch, beta=0.5)
    last_T = torch.zeros(len(logp_T)).index_fill_(0, batch.cu_seqlens[1:] - 1, 1)
    gradient_T = torch.autograd.grad((loss_T * last_T).sum(), logp_T)[0]
    parting = [2, 6, 7, 8]  # 3 against 5, and 6 against 7; equal responses have none
    for good, bad in ((2, 6), (7, 8)):
        slope = -2 * 0.5 * torch.sigmoid(-0.5 * (logp_T[good] - logp_T[bad]))  # a pair counts at both responses
        assert gradient_T[good].item() == pytest.approx(slope.item())
        assert gradient_T[bad].item() == pytest.approx(-slope.item())
    assert gradient_T.nonzero()[:, 0].tolist() == parting
