"""The configuration of a replayed step: every objective can be replayed from every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from RL2.config.load import load, show
from RL2.tools.replay import run_config

REQUIRED = """actor.model_name=m actor.max_length_per_device=64 train_data.path=x train_data.prompts_per_rollout=2
    train_data.responses_per_prompt=3 rollout.env_path=x trainer.experiment_name=x
    rollout.train_sampling_params.max_new_tokens=8 actor.entropy.coef=0.1"""


@pytest.mark.parametrize("select", [[], ["actor.select.not_mode=true"]], ids=["all", "selected"])
@pytest.mark.parametrize("average_over", ["all", "kept", "correct"])
def test_an_objective_on_all_tokens_fits_a_run_on_correct_ones(
    average_over: str, select: list[str], tmp_path: Path
) -> None:
    given = [*REQUIRED.split(), *select, f"actor.average_over={average_over}", "actor.regularize_on=all"]
    (tmp_path / "config.yaml").write_text(show(load("spo", given)))
    on_all = run_config(tmp_path, tmp_path, "ppo").actor
    assert (on_all.train_on, on_all.average_over) == ("all", "all")
    assert on_all.regularize_on == ("all" if select else "kept")
    assert run_config(tmp_path, tmp_path, "spo_0p5").actor.regularize_on == "all"


def test_a_run_from_before_there_were_parts_and_sets_fits(tmp_path: Path) -> None:
    values: Any = OmegaConf.to_container(OmegaConf.create(show(load("ppo", REQUIRED.split()))))
    del values["reward"], values["test_data"]["sets"], values["test_data"]["best_by"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(values))
    config = run_config(tmp_path, tmp_path, "ppo")
    assert (config.reward.weights, config.test_data.sets, config.test_data.best_by) == ({}, {}, None)


def test_losses_of_routers_are_no_part_of_the_compared_gradients(tmp_path: Path) -> None:
    given = [*REQUIRED.split(), "actor.moe.aux_coef=0.1", "actor.moe.z_coef=0.2", "actor.moe.replay=engine"]
    (tmp_path / "config.yaml").write_text(show(load("spo", given)))
    moe = run_config(tmp_path, tmp_path, "ppo").actor.moe
    assert (moe.terms, moe.replay) == ({}, "engine")


def test_the_kept_weights_of_a_quantised_checkpoint_are_not_quantised(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(show(load("spo", [*REQUIRED.split(), "actor.dequantize=true"])))
    config = run_config(tmp_path, tmp_path, "ppo")
    assert not (config.actor.dequantize or config.ref_actor.dequantize)


def test_the_kept_weights_of_a_run_with_adapters_have_them_merged(tmp_path: Path) -> None:
    lora = ["actor.lora.rank=4", "actor.lora.save=adapter", "rollout.engine=vllm", "rollout.vllm.lora=adapter"]
    (tmp_path / "config.yaml").write_text(show(load("spo", [*REQUIRED.split(), *lora])))
    assert run_config(tmp_path, tmp_path, "ppo").actor.lora.rank == 0
