"""Updates of the actor: what stops one, and what is said of one without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from RL2.batch.packing import pack
from RL2.config.load import load
from RL2.parallel.processes import Processes
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems
from RL2.types import Sequence, TokenBatch, Trajectory
from RL2.workers.actor import Actor
from RL2.workers.worker import InvariantError


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Actor]:
    folder, rng = tmp_path_factory.mktemp("gap"), Random(0)
    texts = [Demonstrator().solve(problem, rng) for problem in draw_problems(rng, 20, held_out=False)]
    build_model(folder / "model", texts, seed=0)
    config: Any = load(
        "spo",
        [
            *(f"actor.model_name={folder}/model", "actor.max_length_per_device=99", "train_data.path=x"),
            *("train_data.prompts_per_rollout=2", "rollout.env_path=x", f"trainer.save_dir={folder}"),
            *("rollout.train_sampling_params.max_new_tokens=9", "trainer.experiment_name=x"),
        ],
    )
    processes = Processes.start(timeout_s=60)
    yield Actor(config.actor, processes, 9, Path(folder), max_logprob_gap=0.1)
    processes.stop()


def batch(actor: Actor, odd: dict[int, float], age: int) -> TokenBatch:
    """Two sequences with the trainer's own log-probabilities but for some of the first; 2 of its tokens are older."""
    ids = list(range(5, 15))
    mask = [False] * 4 + [True] * 6
    logps = [0.0, *actor.logps(ids)]
    wrong = [odd.get(t, x) for t, x in enumerate(logps)]
    versions = [-1] * 4 + [3 - age] * 6
    trajectories = [
        Trajectory(row=n, group=n, sample=0, score=1.0, sequences=[Sequence(ids, mask, x, [0.0] * 9 + [1.0], versions)])
        for n, x in enumerate((wrong, logps))
    ]
    made = pack(trajectories, 3)
    return made.with_(advantage_T=torch.ones(len(made.labels_T)))


@pytest.mark.parametrize("age", [0, 1])
@pytest.mark.parametrize("odd", [{5: math.nan}, dict.fromkeys(range(4, 10), math.nan)])
def test_a_log_probability_that_is_no_number_stops_the_update(actor: Actor, odd: dict[int, float], age: int) -> None:
    before = [weight.detach().clone() for weight in actor.policy.parameters()]
    with pytest.raises(
        InvariantError, match=r"trainer and engine are nan nats apart on average, .*the step was not taken"
    ):
        actor.update(batch(actor, odd, age))
    actor.optimizer.zero_grad()
    assert all(map(torch.equal, before, actor.policy.parameters()))


@pytest.mark.parametrize(
    ("value", "said"), [(math.inf, "are inf nats.*the largest is inf"), (-30.0, r"are [0-9.]+ nats")]
)
def test_one_that_is_far_off_stops_it_too(actor: Actor, value: float, said: str) -> None:
    with pytest.raises(InvariantError, match=said + r".*.* at action 1 \(token 10\) of sequence 0;"):
        actor.update(batch(actor, {5: value}, 0))
    actor.optimizer.zero_grad()


def test_without_a_limit_nothing_but_a_number_passes_either(actor: Actor) -> None:
    actor.max_logprob_gap = math.inf
    with pytest.raises(InvariantError, match="nan nats"):
        actor.update(batch(actor, {5: math.nan}, 0))
    actor.optimizer.zero_grad()
    actor.update(batch(actor, {5: -30.0}, 0))
    actor.max_logprob_gap = 0.1
    actor.update(batch(actor, {}, 0))


def test_a_step_without_a_gradient_has_trained_and_changed_nothing(actor: Actor) -> None:
    made = batch(actor, {}, 0)
    learnt = actor.update(made)
    assert learnt["actor/trained_share"] == 1 and learnt["actor/changed_share"] > 0.9
    metrics = actor.update(made.with_(reward_T=torch.zeros_like(made.reward_T)))
    assert metrics["actor/grad_norm"] == 0
    assert metrics["actor/trained_share"] == metrics["actor/changed_share"] == 0
