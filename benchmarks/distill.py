"""On-policy distillation against Dr. GRPO: held-out accuracy per sampled token, on the demo's task.

    python benchmarks/distill.py [--steps 20] [--test-every 5] [--seeds 0 1 2] [--out runs/distill]

The demo's model is warmed up and trained by Dr. GRPO to the end: that is the teacher. Students start at the warm-up
again, each step with 256 responses: Dr. GRPO with 64 prompts and four responses each, and `distill` with 256 prompts,
without rewards. The test is greedy, on 512 held-out problems. Intervals are 95% over seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import torch

from RL2.tools.jobs import Job, run_jobs
from RL2.tools.reproduce.demo import (
    FULL,
    JobBars,
    Method,
    ProgressBoard,
    find_environment,
    method_job,
    num_cores,
    warm_start,
)

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantile of Student's t for a 95% interval, by number of seeds."""


def curve(folder: Path, responses: int) -> list[tuple[int, float, float]]:
    """Return (step, tokens sampled so far, test accuracy) at each test of a run."""
    tokens, found = 0.0, []
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "test/score" in row:
            found.append((int(row["step"]), tokens, float(row["test/score"])))
        if "train/length" in row:
            tokens += responses * row["train/length"]
    return found


def interval(values: list[float]) -> str:
    """Return mean and half width of the interval."""
    if len(values) not in T_95:
        return f"{fmean(values):.1%}"
    return f"{fmean(values):.1%} ± {100 * T_95[len(values)] * stdev(values) / math.sqrt(len(values)):.1f}"


def table(folders: dict[str, list[Path]], responses: int) -> list[str]:
    """Return the lines of a table: accuracy of each method, and the tokens that it has sampled, at each test."""
    lines = ["| method | steps | sampled tokens | accuracy |", "|---|---|---|---|"]
    for title, of_seeds in folders.items():
        for points in zip(*(curve(folder, responses) for folder in of_seeds), strict=True):
            tokens = fmean(tokens for _, tokens, _ in points)
            lines.append(f"| {title} | {points[0][0]} | {tokens:,.0f} | {interval([x for *_, x in points])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--test-every", type=int, default=5)
    parser.add_argument("--warmup-steps", type=int, default=FULL.warmup_steps)
    parser.add_argument("--teacher-steps", type=int, default=FULL.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", default="1e-4", help="learning rate of both methods")
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)

    board, out, env_path = ProgressBoard(), options.out, find_environment()
    grpo = Method("teacher", "Dr. GRPO to the end", "ppo", 4, (f"actor.lr={options.lr}",))
    plan = replace(FULL, warmup_steps=options.warmup_steps, steps=options.teacher_steps)
    teacher = out / grpo.name / "latest"
    with board.progress:
        if not teacher.is_dir():
            warm_start(plan, out, 0, board)
            run_jobs([method_job(grpo, plan, out, 0, env_path)], 1, JobBars(board))
        short = replace(plan, steps=options.steps, test_freq=options.test_every)
        jobs: dict[str, list[Job]] = {"Dr. GRPO": [], "opd": []}
        for seed in options.seeds:
            methods = {
                "Dr. GRPO": replace(grpo, name=f"dr_grpo_{seed}", title=f"Dr. GRPO, seed {seed}"),
                "opd": Method(
                    f"opd_{seed}",
                    f"opd, seed {seed}",
                    "distill",
                    1,
                    (f"actor.lr={options.lr}", f"teacher.model_name={teacher}"),
                ),
            }
            for title, method in methods.items():
                jobs[title].append(method_job(method, short, out, seed, env_path))
        todo = [job for of_seeds in jobs.values() for job in of_seeds if not job.is_done]
        run_jobs(todo, num_cores(), JobBars(board))
    final = curve(out / grpo.name, plan.sequences_per_step)[-1][2]
    board.say(f"teacher: {final:.1%}; {platform.processor() or platform.machine()}, {num_cores()} cores")
    for line in table({title: [job.folder for job in of_seeds] for title, of_seeds in jobs.items()}, 256):
        board.say(line)


if __name__ == "__main__":
    main()
