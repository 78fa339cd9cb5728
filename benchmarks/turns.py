"""Sides of a benchmark: separate processes, for separate peak memory, that alternate, so that noise affects all alike.

The parent starts `Side`s and lets them step in turn; a side is the same script with `--side NAME`, which loops over
`Turns`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import IO

Steps = dict[str, list[dict[str, float]]]
"""Name of a side -> answers of its steps."""


class Turns:
    """Connection of a side to the parent: waits for a request, makes a step, answers."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # output of libraries must not mix with the answers
        self.begun = self.begun_cpu = 0.0
        self.loaded_mb = 0.0

    def wait(self) -> bool:
        """Wait until the next step is due; return False after the last."""
        if not self.begun:
            self.loaded_mb = memory_mb("VmRSS")
        due = sys.stdin.readline() == "step\n"
        self.restart()
        return due

    def restart(self) -> None:
        """Count from now on: what comes before is preparation."""
        self.begun, self.begun_cpu = time.perf_counter(), time.process_time()

    def answer(self, **values: float) -> None:
        """Send the seconds of the step and the peak memory that steps add, updated by `values`."""
        times = {"step_s": time.perf_counter() - self.begun, "cpu_s": time.process_time() - self.begun_cpu}
        peak_mb = memory_mb("VmHWM")
        memory = {"peak_mb": peak_mb, "memory_mb": peak_mb - self.loaded_mb}
        print(json.dumps({**times, **memory, **values}), file=self.answers, flush=True)


def memory_mb(name: str) -> float:
    """Return resident memory of this process in MB, now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


class Side:
    """Process that makes steps on request."""

    def __init__(self, script: str, name: str, arguments: Sequence[str], threads: int, log: Path) -> None:
        self.name, self.log = name, log
        settings = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, script, "--side", name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=os.environ | settings,
        )

    def step(self) -> dict[str, float]:
        into, out = self._pipes()
        with contextlib.suppress(BrokenPipeError):  # the log has the reason
            print("step", file=into, flush=True)
        if not (answer := out.readline()):
            sys.exit(f"{self.name} stopped:\n{self.log.read_text()[-3000:]}")
        result: dict[str, float] = json.loads(answer)
        return result

    def close(self) -> None:
        self._pipes()[0].close()
        self.process.wait()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        return self.process.stdin, self.process.stdout


def alternate(sides: Sequence[Side], steps: int) -> Steps:
    """Run `steps` steps of each side in turn, after a warm-up of one."""
    for side in sides:
        side.step()
    answers: Steps = {side.name: [] for side in sides}
    for _ in range(steps):
        for side in sides:
            answers[side.name].append(side.step())
    for side in sides:
        side.close()
    return answers


Rows = Sequence[tuple[str, str, str, str]]
"""Rows of a table: title, key of a step's answer, name of the ratio, format. Keys in _mb are memory."""


def ratios(steps: Steps, mine: str, peer: str, rows: Rows, suffix: str = "") -> dict[str, float]:
    """Return medians of both sides (maxima for memory), and the ratio of theirs to ours."""
    numbers: dict[str, float] = {}
    for _, key, ratio, _ in rows:
        pick = max if key.endswith("_mb") else median
        own, other = (pick(step[key] for step in steps[side]) for side in (mine, peer))
        numbers |= {f"{ratio}{suffix}": other / own, f"{key}{suffix}": own, f"peer_{key}{suffix}": other}
    return numbers


def table(title: str, peer: str, rows: Rows, numbers: dict[str, float], suffix: str = "") -> str:
    lines = [f"{title:<32}{'RL2':>10}{peer:>10}{f'{peer} / RL2':>12}"]
    for name, key, ratio, form in rows:
        own, other = (form.format(numbers[f"{who}{key}{suffix}"]) for who in ("", "peer_"))
        lines.append(f"  {name:<30}{own:>10}{other:>10}{numbers[ratio + suffix]:>12.2f}")
    return "\n".join(lines)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all of these benchmarks share."""
    options = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    options.add_argument("--steps", type=int, default=5, help="steps per side after the warm-up")
    options.add_argument("--json", type=Path, help="write the numbers to this file")
    options.add_argument("--threads", type=int, default=2, help="threads per side")
    options.add_argument("--side", help=argparse.SUPPRESS)
    return options
