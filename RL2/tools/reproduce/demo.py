"""Demonstration of the thesis's results on a laptop's CPU: python -m RL2.tools.reproduce.demo [--quick | --real]

A model of 245,000 parameters learns to solve word problems from a careless demonstrator, then from rewards, with Dr.
GRPO and with SPO 3.1, 3.2 and 3.3, all from the same warm start and through the programs that train large models. With
--real, a pretrained model of 135 million parameters does so in fewer and smaller steps, with Dr. GRPO and SPO 3.2. The
results are written to OUT/report.html and OUT/summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from RL2.errors import ConfigError, UserError
from RL2.io.jsonl import JsonlTail
from RL2.tools.eval import evaluate as evaluation
from RL2.tools.jobs import Job, JobError, run_jobs
from RL2.tools.reproduce.demo_page import Page, RunView, Scores, findings, headline, summary_json, write_report
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Problem, draw_problem, write_data
from RL2.tools.reproduce.smollm2 import smollm2

MAX_NEW_TOKENS = 36
WARMUP = "warm-up"


@dataclass(frozen=True)
class Method:
    """A method of the demo: its program, responses per prompt and settings."""

    name: str
    title: str
    program: str
    responses_per_prompt: int
    settings: tuple[str, ...]


DR_GRPO, SPO_3_2 = "Dr. GRPO", "SPO 3.2"
# Each method has a learning rate that suits it, 50 to 100 times that of a model with billions of parameters.
METHODS = (
    Method("dr_grpo", DR_GRPO, "ppo", 4, ("actor.lr=1e-4",)),
    Method("spo_3_1", "SPO 3.1", "spo", 1, ("actor.lr=5e-5",)),
    Method("spo_3_2", SPO_3_2, "spo", 1, ("actor.average_over=kept", "actor.lr=1e-4", "actor.scheduler=linear")),
    Method("spo_3_3", "SPO 3.3", "spo_0p5", 1, ("actor.lr=5e-5",)),
)


@dataclass(frozen=True)
class Plan:
    """Model, problems and sizes of the demo: steps of the warm-up and of each method, and how often to test."""

    warmup_steps: int
    steps: int
    test_freq: int
    methods: tuple[Method, ...]
    test_rows: int = 512
    sequences_per_step: int = 256
    warmup_batch: int = 32
    warmup_settings: tuple[str, ...] = (
        "actor.lr=3e-3",
        "actor.betas=[0.9,0.98]",
        "actor.scheduler=wsd",
        "actor.decay_ratio=0.3",
        "actor.warmup_ratio=0.03",
    )
    draw: Callable[[Random], Problem] = draw_problem
    model: str | None = None
    """Folder or hub name of a pretrained model; by default a new one of 245,000 parameters."""

    @property
    def model_words(self) -> str:
        """The model in words."""
        return "SmolLM2-135M-Instruct" if self.model else "A model of 245,000 parameters"


FULL = Plan(warmup_steps=1000, steps=80, test_freq=10, methods=METHODS)
QUICK = Plan(warmup_steps=500, steps=40, test_freq=10, methods=METHODS[2:3])


def real_plan(model: str) -> Plan:
    """Return the plan of the demo with a pretrained model of a hub name or folder."""
    return Plan(
        warmup_steps=20,
        steps=20,
        test_freq=10,
        methods=(
            Method("dr_grpo", DR_GRPO, "ppo", 4, ("actor.lr=1e-5",)),
            Method(
                "spo_3_2", SPO_3_2, "spo", 1, ("actor.average_over=kept", "actor.lr=5e-6", "actor.scheduler=linear")
            ),
        ),
        test_rows=128,
        sequences_per_step=64,
        warmup_batch=16,
        warmup_settings=("actor.lr=1e-4", "actor.warmup_ratio=0.1", "actor.scheduler=linear"),
        draw=partial(draw_problem, counts=(1,), weights=(1.0,)),
        model=model,
    )


class DemoError(UserError):
    """A model of the demo could not be evaluated."""


def warmup_job(
    plan: Plan, out: Path, seed: int, *, name: str = WARMUP, settings: tuple[str, ...] = (), threads: int | None = None
) -> Job:
    """Return the job that trains from scratch on the demonstrations, by default on all cores."""
    folder = out / name
    overrides = (
        f"data.path={out}/data/warmup.jsonl",
        "data.max_length=256",
        f"data.batch_size={plan.warmup_batch}",
        f"actor.model_name={plan.model or out / 'model'}",
        f"actor.max_length_per_device={_microbatch(plan)}",
        "actor.gradient_checkpointing=false",
        *plan.warmup_settings,
        *settings,
        f"trainer.max_steps={plan.warmup_steps}",
        f"trainer.experiment_name={name}",
        f"trainer.save_dir={folder}",
        f"trainer.seed={seed}",
    )
    return Job(name, "sft", overrides, folder, plan.warmup_steps, environment=_environment(threads or num_cores()))


def method_job(method: Method, plan: Plan, out: Path, seed: int, env_path: Path) -> Job:
    """Return the job that trains `method` from the warm start."""
    folder = out / method.name
    overrides = (
        f"train_data.path={out}/data/train.jsonl",
        f"train_data.prompts_per_rollout={plan.sequences_per_step // method.responses_per_prompt}",
        f"train_data.responses_per_prompt={method.responses_per_prompt}",
        f"test_data.path={out}/data/test.jsonl",
        f"actor.model_name={out}/{WARMUP}/latest",
        f"actor.max_length_per_device={_microbatch(plan)}",
        "actor.gradient_checkpointing=false",
        "actor.betas=[0.9,0.99]",
        "actor.weight_decay=0",
        f"actor.warmup_ratio={5 / plan.steps:.3f}",
        *method.settings,
        f"rollout.train_sampling_params.max_new_tokens={MAX_NEW_TOKENS}",
        f"rollout.env_path={env_path}",
        f"trainer.max_steps={plan.steps}",
        f"trainer.test_freq={plan.test_freq}",
        "trainer.samples_per_step=16",
        # for `rl2 atlas`: the first step and the middle one; a pretrained model would take half a gigabyte for each
        *(() if plan.model else (f"trainer.replay_freq={max(1, plan.steps // 2)}",)),
        f"trainer.experiment_name={method.name}",
        f"trainer.save_dir={folder}",
        f"trainer.seed={seed}",
    )
    # one thread: a second gains little for so small a model, and two concurrent runs use two cores better
    return Job(method.title, method.program, overrides, folder, plan.steps, environment=_environment(1))


def _microbatch(plan: Plan) -> int:
    """Return how many tokens a microbatch may have: all of a step, or as many as a laptop's memory holds."""
    return 2048 if plan.model else 32768


def _environment(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


class ProgressBoard:
    """Progress of several jobs: bars on a terminal, otherwise a line per event."""

    def __init__(self) -> None:
        self.console = Console()
        columns = TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        self.progress = Progress(
            *columns, TextColumn("{task.fields[note]}"), console=self.console, disable=not self.console.is_terminal
        )

    def start(self, title: str, total: int, what: str = "steps") -> TaskID:
        if not self.console.is_terminal:
            self.say(f"{title}: {total} {what}")
        return self.progress.add_task(title, total=total, note="")

    def move(self, task: TaskID, done: int, note: str = "") -> None:
        self.progress.update(task, completed=done, note=note)

    def end(self, task: TaskID, title: str, total: int, seconds: float, note: str = "") -> None:
        self.progress.update(task, completed=total, note=note)
        self.progress.stop_task(task)
        if not self.console.is_terminal:
            self.say(f"{title}: done in {seconds:.0f} s{f', {note}' if note else ''}")

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@dataclass
class JobBars:
    """Progress bars of jobs on a board: steps done, and the latest test accuracy or loss."""

    board: ProgressBoard
    tasks: dict[Path, TaskID] = field(default_factory=dict)
    """Folder of a job -> its bar."""
    records: dict[Path, JsonlTail] = field(default_factory=dict)
    notes: dict[Path, str] = field(default_factory=dict)

    def begin(self, job: Job) -> None:
        self.tasks[job.folder] = self.board.start(job.title, job.steps)
        self.records[job.folder] = JsonlTail(job.folder / "metrics.jsonl")
        self.notes[job.folder] = ""

    def look(self, job: Job) -> None:
        """Update the bar from new records of metrics.jsonl."""
        for row in self.records[job.folder].new():
            for key, words in (("test/score", "test accuracy {:.1%}"), ("actor/loss", "loss {:.3f}")):
                if key in row and ("test" in key or job.program == "sft"):
                    self.notes[job.folder] = words.format(row[key])
            done = min(row["step"] + 1, job.steps)  # the test after the last step is one more
            self.board.move(self.tasks[job.folder], done, self.notes[job.folder])

    def end(self, job: Job) -> None:
        self.board.end(self.tasks[job.folder], job.title, job.steps, job.seconds, self.notes[job.folder])


def evaluate(models: Sequence[Path], out: Path, env_path: Path, seed: int, board: ProgressBoard) -> list[Scores]:
    """Evaluate every model on every held-out problem, greedily and sampled."""

    def scores(model: Path) -> Scores:
        records, _ = examine(exam(model, out / "data", env_path, seed, samples=1, out=out / "evals"))
        return Scores(
            greedy=list(evaluation.scores(records, "greedy").values()),
            sampled=list(evaluation.scores(records, "sampled").values()),
        )

    title, started = "final test", time.monotonic()
    task = board.start(title, len(models), "models")
    found = []
    for model in models:
        found.append(scores(model))
        board.move(task, len(found))
    board.end(task, title, len(models), time.monotonic() - started)
    return found


def exam(model: Path, data: Path, env_path: Path, seed: int, *, samples: int, out: Path) -> evaluation.EvalConfig:
    """Return the evaluation of the held-out problems in `data`: greedy, and `samples` times at temperature 1."""
    return evaluation.EvalConfig(
        model=str(model),
        data=str(data / "test.jsonl"),
        env=str(env_path),
        samples=samples,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        out=str(out),
    )


def examine(question: evaluation.EvalConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the records of an evaluation and its summary. Raise DemoError if a response could not be scored."""
    folder, summary = evaluation.evaluate(question)
    if summary["unscored"]:
        raise DemoError(f"{summary['unscored']} responses could not be scored; see {folder}")
    return evaluation.read(folder), summary


def find_environment() -> Path:
    """Return the path of envs/gsm8k.py in the repository, or of its copy in the installed package."""
    path = Path(__file__).resolve().parents[3] / "envs" / "gsm8k.py"
    if not path.is_file():
        return Path(__file__).with_name("gsm8k.py")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def clear(out: Path) -> None:
    """Remove the results of an earlier demo under `out`, and nothing else."""
    for name in ("data", "model", WARMUP, *(method.name for method in METHODS)):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("report.html", "summary.json"):
        (out / name).unlink(missing_ok=True)


def write_plan_data(plan: Plan, out: Path, seed: int) -> list[str]:
    """Write as many rows as the plan needs to OUT/data; return the texts of the warm-up."""
    return write_data(
        out / "data",
        seed,
        warmup_rows=plan.warmup_steps * plan.warmup_batch,
        train_rows=plan.steps * plan.sequences_per_step,
        test_rows=plan.test_rows,
        draw=plan.draw,
    )


def warm_start(plan: Plan, out: Path, seed: int, board: ProgressBoard) -> Job:
    """Create data, tokenizer and a model if the plan has none, and run the warm-up from which all methods start."""
    texts = write_plan_data(plan, out, seed)
    if plan.model is None:
        build_model(out / "model", texts, seed)
    warmup = warmup_job(plan, out, seed)
    run_jobs([warmup], 1, JobBars(board))
    return warmup


def demo(out: Path, seed: int, plan: Plan, board: ProgressBoard) -> None:
    """Run the whole demo and write report.html and summary.json to `out`."""
    started, env_path = time.monotonic(), find_environment()
    clear(out)
    warmup = warm_start(plan, out, seed, board)
    jobs = [method_job(method, plan, out, seed, env_path) for method in plan.methods]
    run_jobs(jobs, num_cores(), JobBars(board))
    before, *after = evaluate([job.folder / "latest" for job in (warmup, *jobs)], out, env_path, seed, board)

    runs = [
        RunView.read(job.folder, job.title, before=before, after=scores, seconds=job.seconds)
        for job, scores in zip(jobs, after, strict=True)
    ]
    total = time.monotonic() - started
    summary = {
        "seed": seed,
        "quick": plan is QUICK,
        "seconds": total,
        "headline": headline(runs),
        "findings": {finding.title: finding.text for finding in findings(runs)},
        "methods": summary_json(runs),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    write_report(out / "report.html", runs, page(plan, [warmup, *jobs], out, seed, total))

    board.say(f"\n{headline(runs)}")
    for finding in findings(runs):
        board.say(f"  {finding.title}: {finding.text}")
    board.say(f"{out / 'report.html'} written; {total:.0f} s in all.")


def page(plan: Plan, jobs: Sequence[Job], out: Path, seed: int, seconds: float) -> Page:
    """Return the text around the figures of the demo's page."""
    option = ["--real"] if plan.model else ["--quick"] if plan is QUICK else []
    return Page(
        title=f"Learning from reward, {'with a pretrained model' if plan.model else 'in miniature'}",
        lead=(
            f"{plan.model_words} is warmed up on careless solutions of grade-school word problems, then "
            f"trained on rewards for {plan.steps} steps of {plan.sequences_per_step} answers: {_titles(plan)}. "
            "The test problems share no calculation with those of training."
        ),
        settings={
            "seed": str(seed),
            "warm-up": f"{plan.warmup_steps} steps of {plan.warmup_batch} demonstrations",
            "Dr. GRPO": "reward minus the group's mean; the loss is averaged over tokens",
            "test": f"every {plan.test_freq} steps, before the first and after the last",
            "time": f"{seconds:.0f} s in all on {num_cores()} cores ({platform.machine()})",
            "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"transformers {transformers.__version__}",
        },
        reproduce=shlex.join(
            ["python", "-m", "RL2.tools.reproduce.demo", "--out", str(out), "--seed", str(seed), *option]
        ),
        commands=[job.shown for job in jobs],
    )


def _titles(plan: Plan) -> str:
    start = "all from the same start" if len(plan.methods) > 1 else "one method only, for a quick look"
    return f"{', '.join(method.title for method in plan.methods)}, {start}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo from command-line arguments and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m RL2.tools.reproduce.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="folder for everything it writes; default: runs/demo or runs/demo-real"
    )
    parser.add_argument("--seed", type=int, default=0)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a short warm-up and SPO 3.2 alone")
    size.add_argument("--real", action="store_true", help="a pretrained model of 135M parameters, in 20 minutes")
    options = parser.parse_args(arguments)

    # so small a model gains nothing from a GPU, and without one the results are the same everywhere
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, _interrupt)  # end the children on `kill` as on Ctrl-C

    board = ProgressBoard()
    out = options.out or Path("runs/demo-real" if options.real else "runs/demo")
    try:
        plan = real_plan(str(smollm2())) if options.real else QUICK if options.quick else FULL
        with board.progress:
            demo(out, options.seed, plan, board)
    except (ConfigError, DemoError, JobError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
