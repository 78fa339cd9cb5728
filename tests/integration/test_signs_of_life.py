"""The log of a run that nobody watches: a line for each part of the start, for each step, and between."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import LIMIT_S, World

SLOW = "__import__('time').sleep(0.06) or len(action) % 2"
"""Rule of a reward that takes a while."""


def log_of(program: str, world: World, folder: Path, *overrides: str) -> str:
    """Run a program that is never silent for more than 0.3 s, without a terminal."""
    code = f"from RL2.trainer.launch import main; main({program!r}, interval_s=0.3)"
    settings = [*world.settings(program), f"trainer.save_dir={folder / 'run'}", *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *settings], capture_output=True, env=environment, timeout=LIMIT_S, check=False
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")
    log = done.stdout.decode()
    assert re.search(r"[\x00-\x09\x0b-\x1f]", log) is None, "no characters that drive a terminal"
    return log


def assert_in_order(log: str, expected: list[str]) -> None:
    lines = iter(log.splitlines())
    for pattern in expected:
        assert any(re.fullmatch(pattern, line) for line in lines), f"{pattern} is not there in its place:\n{log}"


@pytest.mark.slow
def test_a_log_of_reinforcement_learning(world: World, tmp_path: Path) -> None:
    data = world.root / "rl.jsonl"
    tests = (f"test_data.path={data}", "trainer.test_freq=1", "test_data.responses_per_prompt=1")
    log = log_of("spo", world, tmp_path, world.reward(SLOW), *tests, "trainer.save_freq=2", "trainer.max_steps=2")
    assert_in_order(
        log,
        [
            r"spo begins on \d{4}-\d\d-\d\d at \d\d:\d\d:\d\d",
            r"1 process\(es\), cpu; the run writes into .*",
            rf"{data}: 24 rows; prompts of \d+ tokens on average, at most \d+",
            r"actor: .*model: \w+ForCausalLM, \d+ thousand parameters, float32, on cpu",
            r"engine: embedded, in the training processes",
            r"plan: 2 steps, each of 4 prompts x 4 responses of at most 12 tokens: at most 384 tokens in all; "
            r"a test every 1 steps, a checkpoint every 2 steps, the model at the end",
            r"first test: 24 prompts x 1 responses of at most \d+ tokens",
            r"\d\d:\d\d:\d\d  test before step 0: \d+ of 24 responses \(\d+%\), 0:0\d so far.*",
            r"first test: score \d\.\d+, at \d\d:\d\d:\d\d",
            r"\d\d:\d\d:\d\d  rollout of step 0: \d+ of 16 responses \(\d+%\), 0:0\d so far, about 0:0\d left",
            r"step 0/2  test .*  at \d\d:\d\d:\d\d  left \d:\d\d",
            r"step 1/2 .*  at \d\d:\d\d:\d\d",
            r"step 2/2  test .*",
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("program", "what", "model"), [("sft", "examples", "actor"), ("rm", "pairs", "critic")])
def test_a_log_of_supervised_training(program: str, what: str, model: str, world: World, tmp_path: Path) -> None:
    log = log_of(program, world, tmp_path, "trainer.test_freq=2", "data.test_ratio=0.3", "trainer.max_steps=2")
    assert_in_order(
        log,
        [
            rf"{program} begins on .*",
            r"1 process\(es\), cpu; the run writes into .*",
            rf".*: 24 {what}, 0 left out \(data.max_length=128 tokens\)",
            rf"{model}: .*model: \w+, \d+ thousand parameters, float32, on cpu",
            rf"plan: 2 steps, each of 8 {what}: about .* tokens in all; a test every 2 steps, no checkpoints, "
            r"the model at the end",
            r"step 0/2 .*  left \d:\d\d",
            r"step 1/2 .*",
        ],
    )
