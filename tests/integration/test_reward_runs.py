"""A run whose reward has parts, whose environment measures, and which tests on several sets."""

from __future__ import annotations

import math

import pytest
from programs import Run, World

ENVIRONMENT = """
async def step(state, action, extra_info):
    reward = {"digit": any(map(str.isdigit, action)), "spaces": action.count(" ") / 10, "watched": len(action)}
    return dict(next_state=None, reward=reward, score=reward["digit"], done=True, extra_info=extra_info,
                metrics={"characters": len(action), "bad": None})
"""
WEIGHTS = {"digit": 1.0, "spaces": -0.5, "watched": 0.0}


@pytest.fixture(scope="module")
def run(world: World) -> Run:
    script = world.root / "parts.py"
    script.write_text(ENVIRONMENT)
    few = world.root / "few.jsonl"
    few.write_text("".join((world.root / "rl.jsonl").read_text().splitlines(keepends=True)[:5]))
    settings = (
        f"rollout.env_path={script}",
        *(f"reward.weights.{name}={weight}" for name, weight in WEIGHTS.items() if name != "digit"),
        *("trainer.max_steps=1", "trainer.test_freq=1", "adv.estimator=gdpo"),
        "rollout.dynamic_filtering=true",
        *(f"test_data.sets.few.path={few}", "test_data.sets.few.responses_per_prompt=2"),
        *("test_data.sets.few.sampling.temperature=1", f"test_data.sets.whole.path={world.root}/rl.jsonl"),
        *(world.reward("len(action) % 2").replace("rollout.", "test_data.sets.whole."), "test_data.best_by=whole"),
        *("trainer.keep_best=true", "trainer.token_stats_freq=1"),
    )
    return world.run("ppo", *settings).succeeded()


def test_parts_add_up_in_what_a_run_writes(run: Run) -> None:
    parts = [sample for sample in run.samples if "parts" in sample]
    assert {sample.get("set") for sample in parts} == {None, "few"}
    for sample in parts:
        assert sample["reward"] == math.fsum(WEIGHTS[name] * value for name, value in sample["parts"].items())
        assert sample["metrics"] == {"characters": sample["parts"]["watched"]}
    for row in run.metrics[:-1]:
        total = math.fsum(weight * row[f"train/reward/{name}"] for name, weight in WEIGHTS.items())
        assert row["train/reward"] == pytest.approx(total, rel=1e-12)
        assert row["train/env/characters"] == row["train/reward/watched"]


def test_each_set_has_curves_and_one_decides(run: Run) -> None:
    for row in run.metrics:
        assert row["test/score"] == row["test/whole/score"]
        assert row["test/few/reward/digit"] == row["test/few/score"]
        assert "test/whole/reward/digit" not in row
        assert "test/length" not in row
    assert (run.save_dir / "best").is_dir()
    groups = [(s["step"], s["group"], s["sample"]) for s in run.samples if s["split"] == "test"]
    assert len(set(groups)) == len(groups)
    assert "whole " in run.output


def test_a_metric_that_is_no_number_is_named_once(run: Run) -> None:
    said = "step 0: WARNING: a metric of the environment is left out: step returned metrics['bad']=None"
    assert run.output.count(said) == run.output.count("metrics['bad']") == 1
