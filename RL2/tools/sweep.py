"""Sweep over methods and seeds: runs them in sequence, evaluates and compares them. Finished runs are skipped."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from RL2.config.load import load
from RL2.config.programs import PROGRAMS
from RL2.errors import ConfigError, first_line, printable
from RL2.io.progress import duration
from RL2.tools.eval.evaluate import EvalConfig, compared, evaluate
from RL2.tools.jobs import Job, run_jobs
from RL2.tools.settings import parse_settings

TELL_S = 60
"""Seconds between lines about a run that goes on."""


@dataclass(frozen=True)
class SeedJob:
    """Job that runs one method with one seed."""

    method: str
    seed: int
    job: Job


@dataclass(frozen=True)
class Sweep:
    """Runs of methods times seeds, and how to evaluate them."""

    jobs: list[SeedJob]
    judged_by: list[str]
    """Settings of `rl2 eval`, except model and out."""
    folder: Path


def read(file: Path, seeds: int, folder: Path) -> Sweep:
    """Read a sweep from YAML: {methods: {NAME: {program, settings}}, common: [KEY=VALUE], eval: [KEY=VALUE]}.

    Every configuration is checked before anything runs. Raise ConfigError that names the file and the method.
    """
    try:
        tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
        common, judged_by, methods = tree.get("common") or [], tree["eval"], tree["methods"]
        jobs = [
            _seed_job(name, method["program"], seed, [*common, *(method.get("settings") or [])], folder)
            for seed in range(seeds)
            for name, method in methods.items()
        ]
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {first_line(error)}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is not a sweep: it needs methods: {{NAME: {{program: spo, settings: [KEY=VALUE]}}}} and eval: "
            f"[KEY=VALUE] ({first_line(error)})"
        ) from error
    for one in jobs[: len(methods)]:
        if one.job.program not in PROGRAMS:
            raise ConfigError(f"{file}, {one.method}: program: {one.job.program}; choose one of {', '.join(PROGRAMS)}")
        try:
            load(one.job.program, one.job.overrides)
        except ConfigError as error:
            raise ConfigError(f"{file}, {one.method}: {error}") from error
    try:
        parse_settings(EvalConfig, [*judged_by, "model=x"])
    except ConfigError as error:
        raise ConfigError(f"{file}, eval: {error}") from error
    return Sweep(jobs, judged_by, folder)


def _seed_job(method: str, program: str, seed: int, settings: list[str], folder: Path) -> SeedJob:
    name = f"{method}-{seed}"
    own = f"trainer.seed={seed}", f"trainer.experiment_name={name}", f"trainer.save_dir={folder / name}"
    overrides = (*settings, *own, "trainer.load_ckpt_from=latest")
    return SeedJob(method, seed, Job(f"{method}, seed {seed}", program, overrides, folder / name))


def slurm(sweep: Sweep, script: str) -> Iterator[str]:
    """Yield a command to submit each run that is not done."""
    for one in sweep.jobs:
        if not one.job.has_ended:
            yield shlex.join(["sbatch", script, one.job.program, *one.job.overrides])


@dataclass
class _Lines:
    """Monitor that prints a line when a job begins and ends, and its last step once a minute."""

    say: Callable[[str], None]
    left: int
    """Number of jobs that have not ended."""
    told: float = 0.0
    """Time of the last line, by `time.monotonic`."""
    took: list[float] = field(default_factory=list)
    """Seconds of the jobs that have ended."""

    def begin(self, job: Job) -> None:
        self.told = time.monotonic()
        self.say(f"{job.title}: {job.log}")

    def look(self, job: Job) -> None:
        if time.monotonic() - self.told < TELL_S:
            return
        self.told = time.monotonic()
        lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        if steps := [line for line in lines if line.startswith("step ")]:
            self.say(printable(f"{job.title}: {steps[-1]}"))

    def end(self, job: Job) -> None:
        self.left -= 1
        self.took.append(job.seconds)
        left = f"; {self.left} to go, about {duration(fmean(self.took) * self.left)}" if self.left else ""
        self.say(f"{job.title}: {duration(job.seconds)}{left}")


def run(sweep: Sweep, nproc: int, say: Callable[[str], None]) -> list[str]:
    """Run what is not done, evaluate every model, and return the comparison of the methods with the first.

    Raise JobError if a run fails; finished runs stay done.
    """
    missing = []
    for number, one in enumerate(sweep.jobs, 1):
        title = f"{number}/{len(sweep.jobs)} {one.job.title}"
        if one.job.has_ended:
            say(f"{title}: done before")
        else:
            missing.append(replace(one.job, title=title, nproc=nproc))
    run_jobs(missing, 1, _Lines(say, len(missing)))
    return judge(sweep, say)


def judge(sweep: Sweep, say: Callable[[str], None]) -> list[str]:
    """Evaluate all models, and write comparison.md and comparison.json into the sweep's folder."""
    folders: dict[str, list[str]] = {}
    summaries = []
    for one in sweep.jobs:
        model = f"{one.job.folder}/latest"
        config = parse_settings(EvalConfig, [*sweep.judged_by, f"model={model}", f"out={sweep.folder}/evals"])
        folder, summary = evaluate(config)
        folders.setdefault(one.method, []).append(str(folder))
        summaries.append({"method": one.method, "seed": one.seed, "evaluation": str(folder), "summary": summary})
        say(f"{one.job.title}: judged")
    methods = [f"{name}={','.join(paths)}" for name, paths in folders.items()]
    lines = []
    for by, is_scored in (("greedy", config.greedy), ("sampled", config.samples > 0)):
        if is_scored and len(methods) > 1:
            lines += compared(methods, by)
    text = "".join(f"- {line}\n" for line in lines)
    (sweep.folder / "comparison.md").write_text(text, encoding="utf-8")
    (sweep.folder / "comparison.json").write_text(json.dumps(summaries, indent=1))
    say(f"comparison: {sweep.folder / 'comparison.md'}")
    return lines
