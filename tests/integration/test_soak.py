"""The soak (benchmarks/soak.py) in small, and that it sees what it looks for."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/soak.py"


def soak_module() -> Any:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_forty_steps_with_a_server_and_the_trainer_killed(tmp_path: Path) -> None:
    seen, drawn = tmp_path / "seen.json", tmp_path / "memory.svg"
    words = ["--steps", "40", "--warm-up", "10", "--engine-kills", "1", "--trainer-kills", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--out", str(tmp_path / "out"), "--json", str(seen), "--svg", str(drawn)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(seen.read_text())
    assert found["problems"] == [] and (found["rows_drawn"], found["epochs"]) == (160, 1)
    assert len(found["engine_kills"]) == len(found["trainer_kills"]) == 1 and len(found["lives"]) == 2
    assert sum(found["faults"].values()) > 0 and found["unscored"] > 0
    assert found["curve"] and drawn.stat().st_size > 5000


def ledger(soak: Any, out: Path, spoil: str) -> list[str]:
    """The problems of a made-up run of 75 steps, which is two epochs, with something wrong."""
    (out / "run").mkdir(parents=True)
    rows, calls = [], []
    for step in range(75):
        for group in range(soak.PROMPTS):
            row = (step * soak.PROMPTS + group) % soak.NUM_ROWS
            if spoil == "doubled" and (step, group) == (40, 0):
                row += 1
            for sample in range(soak.RESPONSES):
                of = {"step": step, "group": group, "sample": sample, "row": row, "unscored": None}
                rows.append(of | {"reward": 0.0, "score": 0.0})
                calls.append(f"17 {row} none")
    if spoil == "lost":
        rows = [row for row in rows if (row["step"], row["group"]) != (40, 0)]
    if spoil == "half":
        del rows[50]
    if spoil == "scored":
        calls[50] = calls[50].replace("none", "raises")
    if spoil == "paid":
        rows[50] |= {"unscored": "RuntimeError: injected", "reward": 1.0}
    (out / "run" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "ledger.txt").write_text("".join(f"{call}\n" for call in calls))
    seen = soak.Soak(steps=75, warm_up=10, seed=0, engine="embedded", lives=[0])
    soak.check_ledger(out, seen)
    return list(seen.problems)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        ("doubled", "epoch 1: 1 rows were drawn twice"),
        ("lost", "1 groups are missing, the first is (40, 0)"),
        ("half", "group (3, 0) is not 4 samples of one row"),
        ("scored", "1 failed calls have a score"),
        ("paid", "1 unscored trajectories have a reward"),
    ],
)
def test_a_ledger_that_is_wrong(spoil: str, problem: str, tmp_path: Path) -> None:
    soak = soak_module()
    assert ledger(soak, tmp_path / "right", "nothing") == []
    assert any(problem in found for found in ledger(soak, tmp_path / "wrong", spoil))


def test_memory_that_grows() -> None:
    soak = soak_module()
    for slope, holds in ((0.0, True), (0.1, False)):
        curve = [(0, step, 500 + slope * step, 300.0) for step in range(1000)]
        seen = soak.Soak(steps=1000, warm_up=200, seed=0, engine="sglang", lives=[0], curve=curve)
        soak.measure_growth(seen)
        assert seen.holds is holds and seen.growth["children"] == 0
