"""The soak of docs/measurements.md, for 25 steps instead of 2,000: servers are killed, the environment fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    # so few steps say nothing of memory
    options = ["--steps=25", "--engine=sglang", "--kill-every=8", "--max-growth=1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *options, f"--out={tmp_path}/run"]
    done = subprocess.run(
        [*command, f"--json={tmp_path}/numbers.json"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["trajectories"] == 25 * 16
    assert numbers["kills"] >= 1
    assert numbers["restarts"] >= 1
    assert set(numbers["faults"]) == {"raises", "late", "nan", "odd"}
    assert numbers["unscored"] == sum(numbers["faults"].values())
