"""The gradient of the KL term, end to end, against that of the exact KL(policy || reference).

The policy has one distribution over VOCABULARY tokens at each of LENGTH positions, so that every response and its
probability can be enumerated. Responses are drawn by systematic sampling of NUM_SAMPLES: each comes as often as its
probability says, up to one, which leaves an error of rounding where independent draws would leave one of sampling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from RL2.batch.packing import pack
from RL2.config.load import load
from RL2.config.programs import RLConfig
from RL2.errors import ConfigError
from RL2.objectives.loss import kl_in_the_loss, total_loss, with_weights
from RL2.objectives.registry import configured
from RL2.trainer.annotate import annotate
from RL2.types import Sequence, TokenBatch, TokenStats, Trajectory

VOCABULARY, LENGTH, NUM_SAMPLES = 4, 3, 30_000
COEF = 0.25
TOLERANCE = 0.02
"""Of the norm of the exact gradient."""

REQUIRED = f"""actor.model_name=m actor.max_length_per_device=100 train_data.path=x.jsonl rollout.env_path=x.py
    train_data.prompts_per_rollout=1 train_data.responses_per_prompt={NUM_SAMPLES} trainer.experiment_name=x
    rollout.train_sampling_params.max_new_tokens={LENGTH} actor.avg_level=constant actor.kl.coef={COEF}""".split()


@cache
def config(*overrides: str) -> RLConfig:
    return load("ppo", [*REQUIRED, *overrides])


def logits(seed: int) -> Tensor:
    return torch.randn(LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(seed))


POLICY, OLDER, REFERENCE = (logits(seed) for seed in (1, 2, 3))
LOGITS = {"policy": POLICY, "older": OLDER}


def exact(first_PV: Tensor, second_PV: Tensor, live: int) -> Tensor:
    """Gradient by the policy's logits of COEF KL(first || second), a mean over positions; `live` says which it is."""
    leaves = [first_PV.double().requires_grad_(), second_PV.double().requires_grad_()]
    p_PV, q_PV = (leaf.log_softmax(-1) for leaf in leaves)
    kl = COEF / LENGTH * (p_PV.exp() * (p_PV - q_PV)).sum()
    return torch.autograd.grad(kl, leaves[live])[0]


def sampled(logits_PV: Tensor, number: int) -> list[Trajectory]:
    """`number` responses of the policy with these logits, with its log-probabilities."""
    logp_PV = logits_PV.log_softmax(-1)
    responses = torch.tensor(list(product(range(VOCABULARY), repeat=LENGTH)))
    logp_NP = logp_PV[torch.arange(LENGTH), responses]
    cumulative_N = logp_NP.double().sum(-1).exp().cumsum(-1)
    draws = (torch.arange(number, dtype=torch.float64) + 0.5) / number * cumulative_N[-1]
    versions = [-1, *[0] * LENGTH]
    ids, logps = ([[0, *row] for row in x.tolist()] for x in (responses, logp_NP))
    mask, rewards = [False] + [True] * LENGTH, [0.0] * (LENGTH + 1)
    sequences = [Sequence(ids[n], mask, logps[n], rewards, versions) for n in range(len(ids))]
    chosen = torch.searchsorted(cumulative_N, draws).tolist()
    return [Trajectory(0, 0, i, [sequences[n]]) for i, n in enumerate(chosen)]


@cache
def rollout(by: str, staleness: int = 0) -> TokenBatch:
    """Of the policy of LOGITS, packed for weights that are `staleness` versions newer."""
    return pack(sampled(LOGITS[by], NUM_SAMPLES), version=staleness)


@dataclass
class Table:
    """A model with one distribution at each position: the actor and the reference of `annotate`."""

    logits_PV: Tensor

    def stats(self, batch: TokenBatch) -> TokenStats:
        logp_PV = self.logits_PV.log_softmax(-1)
        entropy_P = -(logp_PV.exp() * logp_PV).sum(-1)
        at_T = batch.position_ids_T
        return TokenStats(logp=logp_PV[at_T, batch.labels_T], entropy=entropy_P[at_T])

    def logp(self, batch: TokenBatch, progress: object = None) -> Tensor:
        return self.stats(batch).logp

    def add_old_logprobs(self, batch: TokenBatch, progress: object = None, *, sum_p2: bool = False) -> TokenBatch:
        return batch.with_(old_logp_T=self.logp(batch))


def measured(settings: RLConfig, batch: TokenBatch, arrived: str = "policy") -> Tensor:
    """Gradient of the loss on `batch` by the logits of POLICY; `arrived`: the policy when the rollout arrived."""
    batch = annotate(batch, (), config=settings, actor=Table(LOGITS[arrived]), reference=Table(REFERENCE))  # type: ignore[arg-type]
    batch = with_weights(batch, settings.actor)
    leaf_PV = POLICY.clone().requires_grad_()
    loss_T, _ = total_loss(Table(leaf_PV).stats(batch), batch, settings.actor, configured(settings.actor))
    return torch.autograd.grad((loss_T * batch.weight_T).sum(), leaf_PV)[0].double()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


EXACT = exact(POLICY, REFERENCE, live=0)
TYPES, ESTIMATORS = ("loss", "reward", "advantage"), ("null", "k1", "k2", "k3")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", TYPES)
def test_the_gradient_is_that_of_the_kl_divergence_or_the_estimator_is_refused(kind: str, estimator: str) -> None:
    overrides = (f"actor.kl.type={kind}", f"actor.kl.estimator={estimator}")
    if estimator not in {"loss": ("null", "k2", "k3")}.get(kind, ("null", "k1")):
        with pytest.raises(ConfigError, match=rf"actor\.kl\.estimator={estimator} with actor\.kl\.type={kind}"):
            config(*overrides)
        return
    assert relative_error(measured(config(*overrides), rollout("policy")), EXACT) < TOLERANCE


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("how", ["a later update", "stale tokens"])
def test_off_policy_the_importance_weight_makes_it_exact(how: str, estimator: str) -> None:
    """Rollouts of OLDER; the policy has moved since they arrived, or was no longer OLDER when they did."""
    settings = ("actor.update_per_rollout=2",) if how == "a later update" else ("rollout.max_staleness=1",)
    batch, arrived = (rollout("older"), "older") if how == "a later update" else (rollout("older", 1), "policy")
    settings += ("actor.objective=reinforce", f"actor.kl.estimator={estimator}")
    found = measured(config(*settings), batch, arrived)
    assert relative_error(found, EXACT) < TOLERANCE
    without = measured(config(*settings, "actor.kl.importance_weight=false"), batch, arrived)
    assert relative_error(without, EXACT) > 0.2


def test_k3_without_its_weight_pulls_by_the_reverse_divergence() -> None:
    found = measured(config("actor.kl.estimator=k3", "actor.kl.importance_weight=false"), rollout("policy"))
    assert relative_error(found, exact(REFERENCE, POLICY, live=1)) < TOLERANCE
    assert relative_error(found, EXACT) > 0.2


def test_the_weighted_k3_is_also_an_unbiased_value() -> None:
    batch = rollout("older")
    logp_T, old_T, ref_T = (Table(x).logp(batch) for x in (POLICY, OLDER, REFERENCE))
    p_PV, ref_PV = POLICY.log_softmax(-1), REFERENCE.log_softmax(-1)
    value = float((p_PV.exp() * (p_PV - ref_PV)).sum()) / LENGTH
    found = kl_in_the_loss(logp_T, old_T, ref_T, "k3", weighted=True)
    assert found.mean().item() == pytest.approx(value, rel=TOLERANCE)


WITHOUT_EFFECT = [
    (("actor.kl.importance_weight=false",), "has no effect with actor.update_per_rollout=1 and rollout.max_staleness"),
    (("actor.kl.importance_weight=false", "actor.kl.type=reward"), "has no effect with actor.kl.type=reward"),
    (("actor.regularize_on=all",), "has no effect: actor.train_on=all and actor.select keep everything"),
    (("actor.regularize_on=all", "actor.select.not_mode=true", "actor.kl.type=reward"), "no KL divergence in the loss"),
]


@pytest.mark.parametrize(("overrides", "message"), WITHOUT_EFFECT)
def test_settings_without_effect_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


def small(**changes: Any) -> TokenBatch:
    """Three responses; the last one is wrong."""
    rewards = (1.0, 1.0, 0.0)
    trajectories = [
        Trajectory(0, n, 0, [replace(t.sequences[0], rewards=[0.0, 0.0, 0.0, r])])
        for n, (t, r) in enumerate(zip(sampled(POLICY, 3), rewards, strict=True))
    ]
    return pack(trajectories).with_(**changes)


@pytest.mark.parametrize("average_over", ["all", "kept"])
@pytest.mark.parametrize("level", ["token", "sequence", "constant"])
@pytest.mark.parametrize("regularize_on", ["kept", "all"])
def test_tokens_that_regularisers_act_on(regularize_on: Any, level: Any, average_over: Any) -> None:
    """The objective has the weights of the selection either way, KL and entropy those or an average over all."""
    g = torch.Generator().manual_seed(0)
    off_T = torch.tensor([True, False, False, False, True, True, True, False, True])
    batch = small(off_mode_T=off_T, ref_logp_T=-torch.rand(9, generator=g), advantage_T=torch.randn(9, generator=g))
    everything = replace(config().actor, avg_level=level, tis_coef=0.0)
    select = replace(everything.select, not_mode=True)
    both = replace(everything, train_on="correct", average_over=average_over, select=select)
    both = replace(both, regularize_on=regularize_on, entropy=replace(both.entropy, coef=0.1))
    alone = replace(both, regularize_on="kept", kl=replace(both.kl, coef=0.0), entropy=everything.entropy)

    selected_T = with_weights(batch, alone).weight_T
    expected_T = selected_T if regularize_on == "kept" else with_weights(batch, everything).weight_T
    stats = Table(POLICY).stats(batch)
    terms_T = COEF * (stats.logp - batch.ref_logp_T).square() / 2 - 0.1 * stats.entropy
    expected = (total_loss(stats, batch, alone, configured(alone))[0] * selected_T).sum() + (terms_T * expected_T).sum()

    weighted = with_weights(batch, both)
    loss_T, _ = total_loss(stats, weighted, both, configured(both))
    assert float((loss_T * weighted.weight_T).sum()) == pytest.approx(float(expected), rel=1e-5)
