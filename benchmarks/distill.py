"""On-policy distillation against Dr. GRPO: held-out accuracy per sampled token, on the demo's task with one operation.

    python benchmarks/distill.py [--steps 12] [--test-every 3] [--seeds 0 1 2] [--out runs/distill]

A model of the demo's size is warmed up on careless demonstrations: that is the start. The teacher is the start after
more SFT on correct solutions. Students begin at the start, each step with 128 responses: Dr. GRPO with 32 prompts and
four responses each, and `distill` with 128 prompts, without rewards. The tests are greedy. During training they are of
256 held-out problems, whose calculations nobody has seen: with one operation, that is arithmetic that the teacher does
not know either. After it, they are of 256 new problems with any other calculation, which the teacher solves. Intervals
are 95% over seeds (Student's t); differences are between runs of one seed. An interrupted command goes on with the runs
that are missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import NamedTuple

import torch

from RL2.tools.jobs import Job, run_jobs
from RL2.tools.reproduce.demo import (
    QUICK,
    JobBars,
    Method,
    Plan,
    ProgressBoard,
    evaluate,
    find_environment,
    method_job,
    num_cores,
    warmup_job,
    write_plan_data,
)
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import CAREFUL, draw_problem, draw_problems, write_data, write_demonstrations

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantile of Student's t for a 95% interval, by number of seeds."""
PLAN = replace(
    QUICK,
    warmup_steps=300,
    sequences_per_step=128,
    test_rows=256,
    draw=partial(draw_problem, counts=(1,), weights=(1.0,)),
)


class Point(NamedTuple):
    """A test of a run."""

    step: int
    tokens: float
    """Number of tokens that the run had sampled."""
    accuracy: float


def curve(folder: Path, responses: int) -> list[Point]:
    """Return the tests of a run with `responses` responses a step."""
    tokens, found = 0.0, []
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "test/score" in row:
            found.append(Point(int(row["step"]), tokens, float(row["test/score"])))
        if "train/length" in row:
            tokens += responses * row["train/length"]
    return found


def interval(values: Sequence[float]) -> str:
    """Return mean and half width of the interval."""
    if len(values) not in T_95:
        return f"{fmean(values):.1%}"
    return f"{fmean(values):.1%} ± {100 * T_95[len(values)] * stdev(values) / math.sqrt(len(values)):.1f}"


def table(grpo: Sequence[Job], opd: Sequence[Job], responses: int) -> list[str]:
    """Return the lines of a table: tokens and accuracy of both methods, and their difference, at each test."""
    lines = [
        "| steps | tokens, Dr. GRPO | accuracy | tokens, `opd` | accuracy | difference |",
        "|---|---|---|---|---|---|",
    ]
    curves = ([curve(job.folder, responses) for job in jobs] for jobs in (grpo, opd))
    for theirs, ours in zip(*(zip(*found, strict=True) for found in curves), strict=True):
        cells = [str(ours[0].step)]
        for points in (theirs, ours):
            cells += [f"{fmean(point.tokens for point in points):,.0f}", interval([point.accuracy for point in points])]
        cells.append(interval([b.accuracy - a.accuracy for a, b in zip(theirs, ours, strict=True)]))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def final_table(found: dict[str, list[float]]) -> list[str]:
    """Return the lines of a table: accuracies by model or method, of each seed and as an interval."""
    lines = ["| model | accuracy | seeds |", "|---|---|---|"]
    for title, values in found.items():
        lines.append(f"| {title} | {interval(values)} | {', '.join(f'{x:.1%}' for x in values)} |")
    return lines


def start_and_teacher(out: Path, teacher_steps: int) -> tuple[Job, Job]:
    """Write data and the new model; return the jobs that train the start, and the teacher from it."""
    texts = write_plan_data(PLAN, out, 0)
    if not (out / "model").exists():
        build_model(out / "model", texts, 0)
    plan, solutions = replace(PLAN, warmup_steps=teacher_steps), out / "data" / "solutions.jsonl"
    problems = draw_problems(Random("teacher"), teacher_steps * plan.warmup_batch, held_out=False, draw=plan.draw)
    write_demonstrations(solutions, problems, Random("teacher"), CAREFUL)
    start = warmup_job(PLAN, out, 0, threads=1)
    own = (f"data.path={solutions}", f"actor.model_name={start.folder}/latest", "actor.lr=1e-3")
    return start, warmup_job(plan, out, 0, name="teacher", settings=own, threads=1)


def student_job(plan: Plan, out: Path, seed: int, lr: str, teacher: Path | None) -> Job:
    """Return the job of a student: Dr. GRPO, or distillation from `teacher`."""
    program, number = ("ppo", 4) if teacher is None else ("distill", 1)
    settings = () if teacher is None else (f"teacher.model_name={teacher}",)
    name = "Dr. GRPO" if teacher is None else "opd"
    method = Method(f"{program}_{seed}", f"{name}, seed {seed}", program, number, (f"actor.lr={lr}", *settings))
    return method_job(method, plan, out, seed, find_environment())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--test-every", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", default="3e-4", help="learning rate of both methods")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)

    board, out = ProgressBoard(), options.out
    with board.progress:
        start, teacher = start_and_teacher(out, options.teacher_steps)
        for job in (start, teacher):
            run_jobs([] if job.is_done else [job], 1, JobBars(board))
        plan = replace(PLAN, steps=options.steps, test_freq=options.test_every)
        grpo = [student_job(plan, out, seed, options.lr, None) for seed in options.seeds]
        opd = [student_job(plan, out, seed, options.lr, teacher.folder / "latest") for seed in options.seeds]
        todo = [job for pair in zip(grpo, opd, strict=True) for job in pair if not job.is_done]
        run_jobs(todo, num_cores(), JobBars(board))
    seconds = sum(job.seconds for job in (start, teacher, *grpo, *opd))
    board.say(f"{platform.processor() or platform.machine()}, {num_cores()} cores; {seconds:.0f} s of runs")
    for line in table(grpo, opd, PLAN.sequences_per_step):
        board.say(line)
    solvable = out / "solvable"
    write_data(solvable / "data", 1, warmup_rows=0, train_rows=256, test_rows=0, draw=PLAN.draw)
    (solvable / "data" / "train.jsonl").replace(solvable / "data" / "test.jsonl")
    models = [job.folder / "latest" for job in (start, teacher, *grpo, *opd)]
    scores = evaluate(models, solvable, find_environment(), 0, board)
    first, second, *students = (fmean(each.greedy) for each in scores)
    of_grpo, of_opd = students[: len(grpo)], students[len(grpo) :]
    difference = [b - a for a, b in zip(of_grpo, of_opd, strict=True)]
    names = {"start": [first], "teacher": [second], "Dr. GRPO": of_grpo, "`opd`": of_opd, "difference": difference}
    for line in final_table(names):
        board.say(line)


if __name__ == "__main__":
    main()
