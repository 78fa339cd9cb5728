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
