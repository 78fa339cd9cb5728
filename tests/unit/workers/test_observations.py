"""The cross-entropies on observations and on correct responses against a float64 reference, and off by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from RL2.batch.packing import observation_weights, pack
from RL2.config.load import load
from RL2.errors import ConfigError
from RL2.parallel.processes import Processes
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems
from RL2.types import Sequence, TokenBatch, Trajectory
from RL2.workers.actor import Actor

Make = Callable[..., Actor]
IDS = [list(range(5, 19)), list(range(30, 24, -1)), list(range(40, 48))]
MASKS = [[0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
REWARDS = [1.0, 0.0, 1.0]
COEF = 0.3


def settings(folder: Path, *more: str) -> list[str]:
    return [
        *(f"actor.model_name={folder}/model", "actor.max_length_per_device=20", "train_data.path=x"),
        *("train_data.prompts_per_rollout=3", "rollout.env_path=x", f"trainer.save_dir={folder}", "actor.lr=0.1"),
        *("rollout.train_sampling_params.max_new_tokens=9", "trainer.experiment_name=x", "rollout.max_turns=4", *more),
    ]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    folder, rng = tmp_path_factory.mktemp("observations"), Random(0)
    texts = [Demonstrator().solve(problem, rng) for problem in draw_problems(rng, 20, held_out=False)]
    build_model(folder / "model", texts, seed=0)
    processes = Processes.start(timeout_s=60)

    def make(*more: str) -> Actor:
        config: Any = load("spo", settings(folder, *more))
        return Actor(config.actor, processes, 9, folder)

    yield make
    processes.stop()


def batch(actor: Actor) -> TokenBatch:
    trajectories = []
    for n, (ids, mask, reward) in enumerate(zip(IDS, MASKS, REWARDS, strict=True)):
        logps = [0.0, *actor.logps(ids)]
        rewards = [0.0] * (len(ids) - 1) + [reward]
        sequence = Sequence(ids, [bool(m) for m in mask], logps, rewards, [0 if m else -1 for m in mask])
        trajectories.append(Trajectory(row=n, group=n, sample=0, score=reward, sequences=[sequence]))
    return pack(trajectories, 0)


def gradients(actor: Actor, made: TokenBatch) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    actor.optimizer.zero_grad()
    ((_, minibatch),) = actor.minibatches(made)
    metrics = actor.backward(minibatch, actor.loss, actor.request)
    return {name: weight.grad.detach().double() for name, weight in actor.lm.named_parameters()}, metrics


def test_the_term_is_exact(make: Make) -> None:
    """In several microbatches, of all sequences: also of those whose reward is 0 and which SPO leaves out."""
    actor, plain = make(f"actor.observations.coef={COEF}"), make()
    made = batch(actor)
    with_term, metrics = gradients(actor, made)
    without, metrics_without = gradients(plain, made)
    assert "observation_loss" not in metrics_without
    lm = AutoModelForCausalLM.from_pretrained(plain.config.model_name, dtype=torch.float64)
    terms = []
    for ids, mask in zip(IDS, MASKS, strict=True):
        logp_TV = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        first = mask.index(1)
        terms += [-logp_TV[t - 1, ids[t]] for t in range(first, len(ids)) if not mask[t]]
    assert len(terms) == 6
    reference = torch.stack(terms).mean()
    (COEF * reference).backward()
    for name, weight in lm.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(with_term[name] - without[name], weight.grad, rtol=1e-4, atol=1e-6)
    assert metrics["observation_loss"] == pytest.approx(reference.item(), rel=1e-5)
    assert metrics["loss"] - metrics_without["loss"] == pytest.approx(COEF * reference.item(), rel=1e-4)
    assert metrics["tokens"] == metrics_without["tokens"]


def test_the_term_of_correct_responses_is_exact(make: Make) -> None:
    """VAPO's: over all sampled tokens of the trajectories with a reward, in one mean over the optimizer step."""
    actor, plain = make(f"actor.imitation.coef={COEF}"), make()
    made = batch(actor)
    with_term, metrics = gradients(actor, made)
    without, metrics_without = gradients(plain, made)
    assert "imitation_loss" not in metrics_without
    lm = AutoModelForCausalLM.from_pretrained(plain.config.model_name, dtype=torch.float64)
    terms = []
    for ids, mask, reward in zip(IDS, MASKS, REWARDS, strict=True):
        logp_TV = lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        terms += [-logp_TV[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t] and reward > 0]
    assert len(terms) == 10
    reference = torch.stack(terms).mean()
    (COEF * reference).backward()
    for name, weight in lm.named_parameters():
        assert weight.grad is not None
        torch.testing.assert_close(with_term[name] - without[name], weight.grad, rtol=1e-4, atol=1e-6)
    assert metrics["imitation_loss"] == pytest.approx(reference.item(), rel=1e-5)
    assert metrics["loss"] - metrics_without["loss"] == pytest.approx(COEF * reference.item(), rel=1e-4)


def test_observations_train_where_nothing_else_does(make: Make) -> None:
    actor = make(f"actor.observations.coef={COEF}")
    made = batch(actor)
    metrics = actor.update(made.with_(reward_T=torch.zeros_like(made.reward_T)))
    assert metrics["actor/tokens"] == 0 and metrics["actor/grad_norm"] > 0
    assert metrics["actor/observation_loss"] > actor.update(made)["actor/observation_loss"]


def test_nothing_is_observed_before_the_first_response(make: Make) -> None:
    weight_T = observation_weights(batch(make()))
    shown = [mask[1:] for mask in MASKS]
    wanted = [float(not m and 1 in mask[:t]) for mask in MASKS for t, m in enumerate(mask) if t]
    assert len(weight_T) == sum(map(len, shown))
    assert (weight_T > 0).float().tolist() == wanted and float(weight_T.sum()) == pytest.approx(1)


def test_a_single_turn_has_no_observations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"actor.observations.coef=0.3 has no effect with rollout.max_turns=1"):
        load("spo", settings(tmp_path, f"actor.observations.coef={COEF}", "rollout.max_turns=1"))
