"""Sweep over methods and seeds: runs them in sequence, evaluates and compares them. Finished runs are skipped."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from RL2.config.load import load
from RL2.config.programs import PROGRAMS
from RL2.errors import ConfigError, UserError, first_line
from RL2.tools.eval.evaluate import EvalConfig, compared, evaluate

DONE = "sweep-done"
"""File in a run's folder that marks a successful end."""


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    program: str
    seed: int
    settings: tuple[str, ...]
    folder: Path

    @property
    def overrides(self) -> list[str]:
        name = f"{self.method}-{self.seed}"
        own = (f"trainer.seed={self.seed}", f"trainer.experiment_name={name}", f"trainer.save_dir={self.folder}")
        return [*self.settings, *own, "trainer.load_ckpt_from=latest"]

    def command(self, nproc: int) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
        return [sys.executable, *launcher, "-m", f"RL2.trainer.{self.program}", *self.overrides]

    @property
    def is_done(self) -> bool:
        return (self.folder / DONE).exists()


@dataclass(frozen=True)
class Sweep:
    jobs: list[Job]
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
            Job(name, method["program"], seed, (*common, *(method.get("settings") or [])), folder / f"{name}-{seed}")
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
    for job in jobs[: len(methods)]:
        if job.program not in PROGRAMS:
            raise ConfigError(f"{file}, {job.method}: program: {job.program}; choose one of {', '.join(PROGRAMS)}")
        try:
            load(job.program, job.overrides)
        except ConfigError as error:
            raise ConfigError(f"{file}, {job.method}: {error}") from error
    try:
        EvalConfig.parse([*judged_by, "model=x"])
    except ConfigError as error:
        raise ConfigError(f"{file}, eval: {error}") from error
    return Sweep(jobs, judged_by, folder)


def slurm(sweep: Sweep, script: str) -> Iterator[str]:
    """Yield a command to submit each run that is not done."""
    for job in sweep.jobs:
        if not job.is_done:
            yield shlex.join(["sbatch", script, job.program, *job.overrides])


def run(sweep: Sweep, nproc: int, say: Callable[[str], None]) -> list[str]:
    """Run what is not done, evaluate every model, and return the comparison of the methods with the first.

    Raise UserError if a run fails; finished runs stay done.
    """
    for number, job in enumerate(sweep.jobs, 1):
        name = f"{number}/{len(sweep.jobs)} {job.method}, seed {job.seed}"
        if job.is_done:
            say(f"{name}: done before")
            continue
        job.folder.mkdir(parents=True, exist_ok=True)
        log, began = job.folder / "log.txt", time.monotonic()
        say(f"{name}: {log}")
        with log.open("ab") as out:
            done = subprocess.run(
                job.command(nproc), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{job.method}, seed {job.seed}, ended with {done.returncode}: {''.join(last)} (see {log})")
        (job.folder / DONE).touch()
        say(f"{name}: {time.monotonic() - began:.0f} s")
    return judge(sweep, say)


def judge(sweep: Sweep, say: Callable[[str], None]) -> list[str]:
    """Evaluate all models, and write comparison.md and comparison.json into the sweep's folder."""
    folders: dict[str, list[str]] = {}
    summaries = []
    for job in sweep.jobs:
        config = EvalConfig.parse([*sweep.judged_by, f"model={job.folder}/latest", f"out={sweep.folder}/evals"])
        folder, summary = evaluate(config)
        folders.setdefault(job.method, []).append(str(folder))
        summaries.append({"method": job.method, "seed": job.seed, "evaluation": str(folder), "summary": summary})
        say(f"{job.method}, seed {job.seed}: judged")
    methods = [f"{name}={','.join(paths)}" for name, paths in folders.items()]
    lines = []
    for by, is_scored in (("greedy", config.greedy), ("sampled", config.samples > 0)):
        if is_scored and len(methods) > 1:
            lines += compared(methods, by)
    text = "".join(f"- {line}\n" for line in lines)
    (sweep.folder / "comparison.md").write_text(text, encoding="utf-8")
    (sweep.folder / "comparison.json").write_text(json.dumps(summaries, indent=1))
    return lines
