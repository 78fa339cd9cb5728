"""Rows that cannot be used change the numbers of the rows behind them, and nothing else."""

from __future__ import annotations

import json

import pytest
from programs import Run, World, without_times

pytestmark = pytest.mark.slow


def test_a_run_is_that_without_the_rows(world: World) -> None:
    """Also where rows are drawn by their success rate, and where each prompt is answered once more."""
    lines = (world.root / "rl.jsonl").read_text().splitlines()
    unusable = json.dumps(json.loads(lines[0]) | {"prompt": "", "messages": None})
    (file := world.root / "with_unusable_rows.jsonl").write_text(
        "".join(f"{unusable}\n{line}\n" if n % 3 == 0 else f"{line}\n" for n, line in enumerate(lines))
    )
    settings = (
        "adv.estimator=remax",
        "train_data.curriculum=frontier",
        "train_data.on_bad_row=skip",
        "trainer.n_epochs=3",
        "trainer.save_freq=4",
    )
    steps = 3 * len(lines) // 4  # of four prompts each
    whole, mixed = (
        world.start("ppo", *settings, "train_data.prompts_per_rollout=4", f"trainer.max_steps={steps}", *path)
        for path in ((), (f"train_data.path={file}",))
    )
    expected, found = whole.wait().succeeded(), mixed.wait().succeeded()
    assert "8 of 32 rows" in found.output
    assert without_times(found.metrics) == without_times(expected.metrics)
    assert found.metrics[-1]["curriculum/known"] == 1


def test_rows_in_flight_are_drawn_again_after_a_checkpoint(world: World) -> None:
    lines = (world.root / "rl.jsonl").read_text().splitlines()
    (file := world.root / "first_unusable.jsonl").write_text("\n".join(['{"prompt": ""}', *lines]) + "\n")
    settings = [f"train_data.path={file}", "train_data.on_bad_row=skip", "rollout.max_staleness=1"]
    settings += ["trainer.save_freq=1", "trainer.keep=5", "trainer.max_steps=2", "trainer.samples_per_step=100"]
    first = world.run("ppo", *settings).succeeded()
    again = world.run("ppo", *settings, f"trainer.load_ckpt_from={first.save_dir}/step_000001").succeeded()

    def rows(run: Run) -> list[int]:
        samples = map(json.loads, (run.save_dir / "samples.jsonl").read_text().splitlines())
        return sorted(each["row"] for each in samples if each["step"] == 1)

    assert rows(first) == rows(again) and 0 not in rows(first)
