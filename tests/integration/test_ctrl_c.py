"""Ctrl-C and SIGTERM: once ends after the step with a checkpoint, twice at once."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from programs import World, wait_for_line

SLOW = """
import asyncio

async def step(state, action, extra_info):
    await asyncio.sleep(50)
    return dict(next_state=None, reward=1.0, score=1.0, done=True, extra_info=extra_info)
"""


@pytest.mark.parametrize(
    ("program", "nproc", "number", "name"),
    [
        ("spo", 1, signal.SIGINT, "Ctrl-C"),
        ("sft", 1, signal.SIGTERM, "SIGTERM"),
        ("sft", 2, signal.SIGTERM, "SIGTERM"),
    ],
)
def test_once_saves_and_says_how_to_go_on(
    world: World, program: str, nproc: int, number: signal.Signals, name: str
) -> None:
    run = world.start(program, "trainer.max_steps=100000", nproc=nproc, cold=nproc > 1)
    wait_for_line(run.save_dir / "metrics.jsonl", run)
    run.process.send_signal(number)  # torchrun hands it on
    if number == signal.SIGTERM and nproc == 1:
        run.process.send_signal(number)  # schedulers send it to each process, and torchrun hands on its own
    run.wait()
    if nproc == 1:
        assert run.process.returncode == 128 + number
    assert f"{name}: the run ends after this step" in run.errors
    (saved,) = run.save_dir.glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert json.loads((saved / "notes.json").read_text())["step"] == step == len(run.metrics)
    assert f"ended by {name} after step {step - 1}; resume with trainer.save_dir={run.save_dir}" in run.errors
    more = [f"trainer.max_steps={step + 2}", "trainer.load_ckpt_from=latest"]
    again = world.run(program, *more, save_dir=run.save_dir, nproc=nproc).succeeded()
    assert [row["step"] for row in again.metrics] == list(range(step + 2))


def test_twice_ends_at_once(world: World, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    run = world.start("spo", f"rollout.env_path={tmp_path}/slow.py", "rollout.env_timeout_s=60")
    config = run.save_dir / "config.yaml"
    wait_for_line(config, run)
    time.sleep(3)  # into the rollout, which takes most of a minute
    run.process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 10
    while "press it again to end at once" not in run.errors and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(5) == 130
