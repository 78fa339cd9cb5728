"""Whole runs whose rollouts are begun before they are needed: the bound on staleness, several processes, a kill."""

from __future__ import annotations

import random
import time

import pytest
from programs import NUM_ROWS, Run, World, wait_for_line

STEPS, PROMPTS, SAMPLES = 12, 4, 2
SETTINGS = (
    f"trainer.max_steps={STEPS}",
    f"train_data.prompts_per_rollout={PROMPTS}",
    f"train_data.responses_per_prompt={SAMPLES}",
    "trainer.samples_per_step=100",
    "trainer.save_freq=1",
    "actor.tis_coef=2",
)
MODES = {
    "ahead": ("rollout.max_staleness=2",),
    "partial": ("rollout.max_staleness=2", "rollout.partial_rollout=0.5"),
}


def rows(run: Run) -> list[list[int]]:
    """Of each step, the rows that it trained on."""
    return [
        [sample["row"] for sample in run.samples if sample["step"] == step and sample["sample"] == 0]
        for step in range(STEPS)
    ]


def check(run: Run, mode: str, on_policy: Run) -> None:
    assert [row["step"] for row in run.metrics] == list(range(STEPS))
    for metrics in run.metrics:
        ages = [metrics[f"staleness/{age}"] for age in range(3)]
        assert sum(ages) == pytest.approx(1)
        # tokens of the present weights are checked as ever; older ones have drifted
        assert metrics.get("actor/logp_gap", 0) < 1e-5
    assert any(metrics["staleness/0"] < 1 for metrics in run.metrics)
    assert any("actor/drift" in metrics for metrics in run.metrics)
    if mode == "ahead":  # the same rows in the same steps
        assert rows(run) == rows(on_policy)
    else:  # two rows of the data in turn: each as often as if all were taken in order
        assert sorted(row for of in rows(run) for row in of) == sorted(2 * [*range(NUM_ROWS)])


@pytest.fixture(scope="module")
def on_policy(world: World) -> Run:
    return world.run("spo", *SETTINGS).succeeded()


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_ahead_trains_on_every_row_once_and_on_nothing_too_old(
    mode: str, nproc: int, world: World, on_policy: Run
) -> None:
    check(world.run("spo", *SETTINGS, *MODES[mode], nproc=nproc).succeeded(), mode, on_policy)


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_run_loses_and_doubles_nothing(mode: str, world: World, on_policy: Run) -> None:
    run = world.start("spo", *SETTINGS, *MODES[mode])
    wait_for_line(run.save_dir / "metrics.jsonl", run)
    time.sleep(random.uniform(0, 1))
    run.kill()
    again = world.run("spo", *SETTINGS, *MODES[mode], "trainer.load_ckpt_from=latest", save_dir=run.save_dir)
    check(again.succeeded(), mode, on_policy)
