"""Programs run as child processes, each with a folder, a log and a file that marks its successful end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from RL2.errors import UserError

DONE = "done.json"
"""File in the folder of a job that has ended successfully, with its command and its duration in seconds."""
LOG = "console.log"
LOOK_S = 0.2
"""Interval at which running jobs are looked at."""


class JobError(UserError):
    """A program that was started as a job has failed."""


def command_line(program: str, overrides: Sequence[str], nproc: int = 1) -> list[str]:
    """Return the command of a program, with torchrun if it takes several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launcher, "-m", f"RL2.trainer.{program}", *overrides]


@dataclass(frozen=True)
class Job:
    """A program to run in a folder of its own."""

    title: str
    program: str
    overrides: tuple[str, ...]
    folder: Path
    steps: int = 0
    """Number of training steps, for progress bars."""
    nproc: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables beside those of this process."""

    @property
    def command(self) -> list[str]:
        return command_line(self.program, self.overrides, self.nproc)

    @property
    def shown(self) -> str:
        """Command line in the form in which a user would type it."""
        return shlex.join(["python", *self.command[1:]])

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def has_ended(self) -> bool:
        """True if a job in this folder has ended successfully, with whatever settings."""
        return (self.folder / DONE).exists()

    @property
    def is_done(self) -> bool:
        """True if this exact command has ended successfully."""
        return self.has_ended and json.loads((self.folder / DONE).read_text())["command"] == self.shown

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of a finished job."""
        return float(json.loads((self.folder / DONE).read_text())["seconds"])


class Monitor(Protocol):
    """A view of running jobs, such as progress bars."""

    def begin(self, job: Job) -> None: ...

    def look(self, job: Job) -> None: ...

    def end(self, job: Job) -> None: ...


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start the command of a job, which writes to the log in its folder."""
    with job.log.open("ab") as log:
        environment = os.environ | job.environment
        return subprocess.Popen(
            job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )


class _Child:
    """A running job."""

    def __init__(self, job: Job) -> None:
        self.job, self.started = job, time.monotonic()
        job.folder.mkdir(parents=True, exist_ok=True)
        self.process = start(job)

    def finish(self) -> None:
        """Mark the job as done. Raise JobError if it failed."""
        job, code = self.job, self.process.returncode
        if code:
            last = job.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise JobError(f"{job.title} failed with exit code {code}: {''.join(last)} (see {job.log})")
        seconds = time.monotonic() - self.started
        (job.folder / DONE).write_text(json.dumps({"command": job.shown, "seconds": seconds}))


def run_jobs(jobs: Sequence[Job], at_once: int, monitor: Monitor) -> None:
    """Run all jobs, at most `at_once` concurrently.

    Raise JobError if one fails; the jobs that are still running are ended then.
    """
    waiting, running = deque(jobs), list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                monitor.begin(job)
                running.append(_Child(job))
            time.sleep(LOOK_S)
            for child in list(running):
                is_over = child.process.poll() is not None
                monitor.look(child.job)
                if is_over:
                    child.finish()
                    running.remove(child)
                    monitor.end(child.job)
    finally:
        # nothing may continue in the background after a failure or Ctrl-C
        for child in running:
            child.process.terminate()
        for child in running:
            try:
                child.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
