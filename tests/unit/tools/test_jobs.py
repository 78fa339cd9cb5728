"""Programs as child processes: what is recorded of those that end well, and what becomes of the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from RL2.tools.jobs import DONE, Job, JobError, command_line, run_jobs


class Events:
    """Monitor that records what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def begin(self, job: Job) -> None:
        self.events.append(("begin", job.title))

    def look(self, job: Job) -> None: ...

    def end(self, job: Job) -> None:
        self.events.append(("end", job.title))


def test_a_failure_is_named_with_its_log_and_no_other_job_begins(tmp_path: Path) -> None:
    jobs = [Job(name, "none_of_this_name", (), tmp_path / name) for name in ("a", "b")]
    monitor = Events()
    with pytest.raises(JobError, match=r"^a failed with exit code 1: .*none_of_this_name.* \(see .*console\.log\)$"):
        run_jobs(jobs, 1, monitor)
    assert monitor.events == [("begin", "a")]
    assert not any(job.has_ended for job in jobs)


def test_a_job_is_done_only_with_the_same_command(tmp_path: Path) -> None:
    job = Job("a", "sft", ("actor.lr=1",), tmp_path)
    (tmp_path / DONE).write_text(json.dumps({"command": job.shown, "seconds": 3}))
    assert job.is_done
    assert job.seconds == 3
    other = Job("a", "sft", ("actor.lr=2",), tmp_path)
    assert other.has_ended
    assert not other.is_done


def test_several_processes_are_started_by_torchrun() -> None:
    assert command_line("spo", ["a=1"]) == [sys.executable, "-m", "RL2.trainer.spo", "a=1"]
    several = command_line("spo", ["a=1"], nproc=4)
    assert several[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4"]
    assert several[5:] == ["-m", "RL2.trainer.spo", "a=1"]
