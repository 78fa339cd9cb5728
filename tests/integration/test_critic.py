"""PPO with a critic, as a user runs it."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean

import torch
from programs import World
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForSequenceClassification, AutoTokenizer

FROZEN = 2


def test_ppo_with_a_critic_solves_a_bandit(world: World, tmp_path: Path) -> None:
    """Each token is an arm, and digits pay. The actor waits for the critic, and moves only then."""
    run = world.run(
        "ppo",
        "adv.estimator=gae",
        "adv.lamda=0.95",
        "adv.global_norm=true",
        "adv.norm_var=true",
        f"actor.freeze_steps={FROZEN}",
        "actor.lr=3e-3",
        "critic.lr=3e-3",
        "train_data.prompts_per_rollout=8",
        "train_data.responses_per_prompt=8",
        "trainer.max_steps=30",
        f"trainer.save_freq={FROZEN}",
        "trainer.keep=0",
        world.reward("sum(character.isdigit() for character in action) / max(1, len(action))"),
    ).succeeded()
    steps = run.metrics
    assert ["actor/loss" in row for row in steps] == [step >= FROZEN for step in range(30)]
    assert all(math.isfinite(row["critic/loss"]) and row["critic/loss"] > 0 for row in steps)
    assert fmean(row["train/score"] for row in steps[:3]) < 0.1
    assert fmean(row["train/score"] for row in steps[-3:]) > 0.5
    assert all(row["actor/logp_gap_max"] <= 1e-4 for row in steps[FROZEN:])

    # what was frozen is as it was, bit for bit
    dcp_to_torch_save(run.save_dir / f"step_{FROZEN:06d}" / "state", tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt")["model"]
    assert all(torch.equal(saved[f"lm.{name}"], weight) for name, weight in load_file(world.weights).items())

    critic = AutoModelForSequenceClassification.from_pretrained(run.save_dir / "critic")
    tokenizer = AutoTokenizer.from_pretrained(run.save_dir / "critic")
    batch = tokenizer(["Ben has 12 apples.", "12"], return_tensors="pt", padding=True)
    assert critic(**batch).logits.shape == (2, 1)


def test_critic_replacements_and_the_best_model_on_two_processes(world: World) -> None:
    """Everything that all processes must decide alike, in one run that goes on after its end."""
    settings = (
        "adv.estimator=gae",
        "critic.lr=1e-3",
        "actor.kl.coef=0.01",
        "actor.kl.type=reward",
        "rollout.max_turns=2",
        "rollout.dynamic_filtering=true",
        "rollout.dynamic_filtering_rounds=3",
        f"test_data.path={world.root}/rl.jsonl",
        "trainer.test_freq=1",
        "trainer.save_freq=1",
        "trainer.keep=1",
        "trainer.keep_best=true",
    )
    run = world.run("ppo", *settings, nproc=2).succeeded()
    assert all(0 <= row["train/filtered"] < 1 for row in run.metrics[:3])
    assert [path.name for path in run.save_dir.glob("step_*")] == ["step_000003"]
    more = ("trainer.load_ckpt_from=latest", "trainer.max_steps=5")
    again = world.run("ppo", *settings, *more, nproc=2, save_dir=run.save_dir).succeeded()
    assert [row["step"] for row in again.metrics] == [0, 1, 2, 3, 4, 5]
    assert all(row["actor/logp_gap_max"] <= 1e-4 for row in again.metrics[:5])
    assert {path.parent.name for path in run.save_dir.glob("*/config.json")} == {"best", "critic", "latest"}
