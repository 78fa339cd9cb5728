"""The programs on a GPU: bfloat16, variable-length attention, statistics by Triton, sampling in the same process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems

ENVIRONMENT = """
async def step(state, action, extra_info):
    reward = float(any(character.isdigit() for character in action))
    return dict(next_state=None, reward=reward, score=reward, done=True, extra_info=extra_info)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("world"), Random(0)
    pairs = [(p.question, Demonstrator().solve(p, rng)) for p in draw_problems(rng, 24, held_out=False)]
    build_model(root / "model", [text for pair in pairs for text in pair], seed=0)
    rows = [json.dumps({"prompt": question, "response": answer, "extra_info": {}}) for question, answer in pairs]
    (root / "rows.jsonl").write_text("\n".join(rows))
    pairs_rows = [{"prompt": q, "chosen": a, "rejected": " ".join(a.split()[::-1])} for q, a in pairs]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs_rows)))
    (root / "environment.py").write_text(ENVIRONMENT)
    return root


def run(world: Path, program: str, name: str, *overrides: str) -> list[dict[str, float]]:
    """Metrics of a few steps."""
    model = "critic" if program == "rm" else "actor"
    if program in ("sft", "rm", "dpo"):
        file = "rows" if program == "sft" else "pairs"
        data = [f"data.path={world}/{file}.jsonl", "data.max_length=128", "data.batch_size=8"]
    else:
        data = [
            f"train_data.path={world}/rows.jsonl",
            "train_data.prompts_per_rollout=4",
            "train_data.responses_per_prompt=4",
            "rollout.train_sampling_params.max_new_tokens=24",
            f"rollout.env_path={world}/environment.py",
            "rollout.compile=false",
        ]
    common = [
        f"{model}.model_name={world}/model",
        f"{model}.max_length_per_device=1024",
        f"{model}.lr=1e-3",
        "trainer.max_steps=3",
        "trainer.save_freq=2",
        f"trainer.experiment_name={name}",
        f"trainer.save_dir={world}/{name}",
    ]
    command = [sys.executable, "-m", f"RL2.trainer.{program}", *data, *common, *overrides]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (world / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_fine_tuning(world: Path) -> None:
    metrics = run(world, "sft", "sft")
    assert metrics[2]["actor/loss"] < metrics[0]["actor/loss"]
    exact = run(world, "sft", "sft32", "actor.dtype=float32")
    assert metrics[0]["actor/loss"] == pytest.approx(exact[0]["actor/loss"], rel=0.01)
    assert metrics[0]["actor/loss"] != exact[0]["actor/loss"]


@pytest.mark.parametrize("objective", ["ppo", "spo", "rank_jsd"])
def test_reinforcement(world: Path, objective: str) -> None:
    program = "ppo" if objective == "ppo" else "spo"
    settings = ("actor.entropy.coef=0.01", "actor.update_per_rollout=2", f"actor.objective={objective}")
    metrics = run(world, program, objective, *settings)
    assert len(metrics) == 3
    for row in metrics:
        assert row["actor/logp_gap"] < 0.05  # the engine, one token at a time, against the packed update; bfloat16
        assert row["actor/grad_norm"] > 0
        assert row["actor/changed_share"] > 0.5


def test_reinforcement_with_compiled_layers(world: Path) -> None:
    for row in run(world, "spo", "compiled", "rollout.compile=true"):
        assert row["actor/logp_gap"] < 0.05


def test_a_reward_model(world: Path) -> None:
    metrics = run(world, "rm", "rm", "critic.scheduler=constant", "trainer.max_steps=20")
    assert metrics[0]["critic/loss"] == pytest.approx(math.log(2), abs=0.5)
    assert metrics[-1]["critic/loss"] < 0.5 * metrics[0]["critic/loss"]
    exact = run(world, "rm", "rm32", "critic.dtype=float32")
    assert metrics[0]["critic/loss"] == pytest.approx(exact[0]["critic/loss"], abs=0.05)


def test_preferences(world: Path) -> None:
    metrics = run(world, "dpo", "dpo", "actor.scheduler=constant", "trainer.max_steps=20")
    assert metrics[0]["actor/loss"] == pytest.approx(math.log(2), abs=0.02)  # the policy is the reference still
    assert metrics[-1]["actor/loss"] < 0.5 * metrics[0]["actor/loss"]
    assert metrics[-1]["actor/margin"] > 1


def test_reinforcement_with_a_critic(world: Path) -> None:
    settings = ("adv.estimator=gae", "adv.lamda=0.95", "critic.lr=1e-3", "actor.kl.coef=0.01", "actor.kl.type=reward")
    for row in run(world, "ppo", "critic", *settings):
        assert row["actor/logp_gap"] < 0.05
        for model in ("actor", "critic"):
            assert math.isfinite(row[f"{model}/loss"])
            assert row[f"{model}/grad_norm"] > 0
            assert row[f"{model}/changed_share"] > 0.5
