"""Environments of envs/ in training: several turns that are learnt, and one that runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from openenv_server import served
from programs import World

from envs.calculator import INSTRUCTION, problem
from RL2.tools.reproduce.model import build_model

ENVS = Path(__file__).resolve().parents[2] / "envs"


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and demonstrations with the calculator of which half forget the last part of the task."""
    folder, rng, rows = tmp_path_factory.mktemp("calculator"), Random(0), []
    for seed in range(1024):
        question, answer = problem(seed)
        boxes, pieces, lost = (word for word in question.split() if word.isdigit())
        expression = f"{boxes}*{pieces}-{lost}"
        if rng.random() < 0.5:
            expression, answer = f"{boxes}*{pieces}", str(int(boxes) * int(pieces))
        response = f"<calc>{expression}</calc><result>{answer}</result>#### {answer}"
        messages = [{"role": "user", "content": question + INSTRUCTION}, {"role": "assistant", "content": response}]
        rows.append({"messages": messages})
    build_model(folder / "model", [message["content"] for row in rows for message in row["messages"]], seed=0)
    write(folder / "sft.jsonl", rows)
    return folder


def test_ppo_with_a_critic_learns_to_use_the_calculator(world: World, folder: Path) -> None:
    """The problems are made up on the way; a reward comes after two turns, the second of which reads a result."""
    model = ("actor.max_length_per_device=4096", "actor.gradient_checkpointing=false")
    start = world.run(
        "sft",
        *model,
        f"data.path={folder}/sft.jsonl",
        "data.max_length=256",
        "data.batch_size=32",
        f"actor.model_name={folder}/model",
        "actor.lr=4e-3",
        "actor.warmup_ratio=0.1",
        "actor.scheduler=cosine",
        "trainer.n_epochs=10",
        "trainer.max_steps=250",
    ).succeeded()
    run = world.run(
        "ppo",
        *model,
        f"actor.model_name={start.save_dir}/latest",
        "actor.lr=4e-4",
        "actor.freeze_steps=2",
        "critic.lr=1e-3",
        "adv.estimator=gae",
        "adv.lamda=0.95",
        "adv.global_norm=true",
        "adv.norm_var=true",
        f"rollout.env_path={ENVS}/calculator.py",
        "rollout.max_turns=3",
        "rollout.train_sampling_params.max_new_tokens=24",
        "rollout.train_sampling_params.stop=['</calc>']",
        "rollout.test_sampling_params.temperature=1",
        "train_data.path=null",
        "train_data.prompts_per_rollout=16",
        "train_data.responses_per_prompt=8",
        "test_data.prompts_per_rollout=64",
        "trainer.max_steps=15",
        "trainer.test_freq=15",
    ).succeeded()
    before, after = (row["test/score"] for row in run.metrics if "test/score" in row)
    print(f"calculator: {before:.3f} -> {after:.3f}")
    assert after >= before + 0.2
    assert all(row["actor/logp_gap_max"] < 1e-4 for row in run.metrics if "actor/loss" in row)
    solved = next(sample for sample in run.samples if sample["score"] == 1)
    assert "</calc><result>" in solved["texts"][2]  # what it read in its second turn


def test_countdown_runs(world: World, tmp_path: Path) -> None:
    rows = [{"target": 10 + n, "nums": [10, n, 3]} for n in range(8)]
    write(tmp_path / "rows.jsonl", rows)
    run = world.run(
        "ppo",
        f"train_data.path={tmp_path}/rows.jsonl",
        f"test_data.path={tmp_path}/rows.jsonl",
        f"rollout.env_path={ENVS}/countdown.py",
        "rollout.train_sampling_params.stop=['</answer>']",
        "actor.max_length_per_device=2048",
        "trainer.test_freq=3",
    ).succeeded()
    assert [row["train/unscored"] for row in run.metrics if "actor/loss" in row] == [0, 0, 0]
    assert {row["test/score"] for row in run.metrics if "test/score" in row} <= {0, 1 / 8}
    assert "10" in run.samples[0]["texts"][0]


@pytest.mark.skipif(importlib.util.find_spec("openenv") is None, reason="pip install openenv")
def test_an_environment_of_openenv_trains(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are more episodes than the server has places, and each ends at the limit of turns."""
    with served("echo") as url:
        monkeypatch.setenv("OPENENV_URL", url)
        run = world.run(
            "spo",
            "train_data.path=null",
            "train_data.prompts_per_rollout=2",
            "train_data.responses_per_prompt=4",
            f"rollout.env_path={ENVS}/openenv.py",
            "rollout.max_turns=2",
            "rollout.train_sampling_params.max_new_tokens=4",
            "actor.max_length_per_device=2048",
            "trainer.max_steps=2",
        ).succeeded()
    assert [row["train/unscored"] for row in run.metrics] == [0, 0]
    assert all(row["train/turns"] == 2 and row["actor/logp_gap_max"] < 1e-4 for row in run.metrics)
    assert all("Reply with the value of 'message' alone" in sample["texts"][0] for sample in run.samples)
    assert all(sample["texts"][2].count(sample["texts"][1].strip()) >= 2 for sample in run.samples), (
        "a message comes back"
    )
