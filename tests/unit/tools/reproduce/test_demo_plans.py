"""The plans of the demo: settings that the programs take, and problems of the size that each model can learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from RL2.config.load import load
from RL2.tools.reproduce.demo import FULL, QUICK, WARMUP, method_job, real_plan, warmup_job, write_plan_data

PLANS = {"full": FULL, "quick": QUICK, "real": real_plan("FOLDER")}


@pytest.mark.parametrize("name", PLANS)
def test_programs_take_the_settings(name: str, tmp_path: Path) -> None:
    plan = PLANS[name]
    jobs = [warmup_job(plan, tmp_path, 0)]
    jobs += [method_job(method, plan, tmp_path, 0, Path("envs/gsm8k.py")) for method in plan.methods]
    configs = [load(job.program, list(job.overrides)) for job in jobs]
    models = [config.actor.model_name for config in configs]  # type: ignore[union-attr]
    assert models == [plan.model or f"{tmp_path}/model", *[f"{tmp_path}/{WARMUP}/latest"] * len(plan.methods)]


def test_a_pretrained_model_gets_problems_of_one_step(tmp_path: Path) -> None:
    plan = real_plan("FOLDER")
    solutions = [text for text in write_plan_data(plan, tmp_path, 0) if "####" in text or "Answer" in text]
    assert len(solutions) == plan.warmup_steps * plan.warmup_batch
    assert {solution.count("=") for solution in solutions} == {1}
    assert len(rows(tmp_path, "train")) == plan.steps * plan.sequences_per_step
    assert len(rows(tmp_path, "test")) == plan.test_rows


def rows(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text().splitlines()]
