"""A critic's values and updates do not depend on how the work is cut: on one process and on two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pools import in_pool, whole
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from RL2.batch.advantages import gae
from RL2.batch.packing import microbatches, pack
from RL2.config.load import load
from RL2.parallel.processes import Processes
from RL2.types import Sequence, TokenBatch, Trajectory
from RL2.workers.critic import Critic

WHOLE, CUT = 4096, 150
Results = dict[str, Any]


def make_batch() -> TokenBatch:
    """Trajectories of one or two sequences, in groups that begin alike."""
    draw = random.Random(0)
    trajectories = []
    for n in range(11):
        if n % 4 == 0:
            prompt = [draw.randrange(50) for _ in range(draw.randint(1, 20))]
        sequences = []
        for _ in range(1 + n % 2):
            length = draw.randint(1, 40)
            ids, mask = prompt + [draw.randrange(50) for _ in range(length)], [False] * len(prompt) + [True] * length
            zeros = [0.0] * len(ids)
            sequences.append(Sequence(ids, mask, zeros, [*zeros[1:], draw.uniform(-1, 1)]))
        trajectories.append(Trajectory(row=n, group=n // 4, sample=n % 4, sequences=sequences))
    return pack(trajectories)


def run(folder: Path, processes: Processes, max_tokens: int) -> Results:
    """Two optimizer steps on one rollout: its values, the metrics, and the weights after it."""
    overrides = f"""actor.model_name={folder}/value actor.max_length_per_device=100 adv.estimator=gae critic.lr=1e-3
        critic.max_length_per_device={max_tokens} critic.warmup_ratio=0 critic.update_per_rollout=2 critic.clip=0.2
        train_data.path=x.jsonl train_data.prompts_per_rollout=2 rollout.env_path=x.py
        rollout.train_sampling_params.max_new_tokens=1 trainer.experiment_name=x"""
    critic = Critic(load("ppo", overrides.split()).critic, processes, 10, folder)
    batch = make_batch()
    batch = batch.with_(value_T=critic.values(batch))
    assert batch.value_T is not None
    advantage_T = gae(batch, gamma=0.99, lamda=0.95)
    metrics = critic.update(batch.with_(return_T=advantage_T + batch.value_T))
    weights = {name: whole(weight) for name, weight in critic.weights()}
    return {"values": batch.value_T, "metrics": metrics, "weights": weights}


def run_both(folder: Path, processes: Processes) -> dict[str, Results]:
    return {"whole": run(folder, processes, WHOLE), "cut": run(folder, processes, CUT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("critic")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(
        vocab_size=50, intermediate_size=48, head_dim=8, initializer_range=0.2, pad_token_id=0, num_labels=1, **shape
    )
    Qwen3ForSequenceClassification(config).save_pretrained(folder / "value")
    return folder


@pytest.fixture(scope="module")
def one(folder: Path, processes: Processes) -> Results:
    return run(folder, processes, WHOLE)


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Results]:
    return in_pool(run_both, folder, 2)[0]


def assert_same(ours: Results, theirs: Results) -> None:
    torch.testing.assert_close(ours["values"], theirs["values"], rtol=1e-5, atol=1e-6)
    assert theirs["metrics"] == pytest.approx(ours["metrics"], rel=1e-4)
    for name, weight in ours["weights"].items():
        # Adam divides by the root of the second moment: where gradients are tiny, rounding is amplified
        assert (weight - theirs["weights"][name]).norm() <= 1e-4 * weight.norm(), name


def test_two_processes_are_one(one: Results, two: dict[str, Results]) -> None:
    metrics = one["metrics"]
    assert metrics["critic/loss"] > 0
    assert metrics["critic/grad_norm"] > 0
    assert_same(one, two["whole"])
    assert_same(one, two["cut"])


def test_microbatches_are_one_batch(one: Results, folder: Path, processes: Processes) -> None:
    batch = make_batch()
    assert len(microbatches(batch, range(batch.num_sequences), CUT, 1)[0]) > 2
    assert_same(one, run(folder, processes, CUT))


def test_values_stand_at_actions_only(one: Results) -> None:
    batch = make_batch()
    assert not one["values"][~batch.action_T].any()
    assert one["values"][batch.action_T].all()
