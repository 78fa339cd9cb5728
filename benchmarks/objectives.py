"""Comparison of many objectives from one warm start, the demo's, with the same settings.

    python benchmarks/objectives.py [--steps 30] [--lr 5e-5] [--out runs/objectives]

Each run takes 256 responses per step and is tested on the demo's 512 held-out problems. The warm start is created once,
in OUT. A run that breaks an invariant ends the script. Scores are those of one seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
import transformers

from RL2.tools.jobs import run_jobs
from RL2.tools.reproduce.demo import (
    FULL,
    JobBars,
    Method,
    Plan,
    ProgressBoard,
    evaluate,
    find_environment,
    method_job,
    num_cores,
    warm_start,
)


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    method: str
    greedy: float
    sampled: float
    entropy: tuple[float, float]
    """Entropy of the rollouts in the first three steps and in the last three."""
    length: float
    logp_gap_max: float


SUCCESSFUL = ("actor.average_over=kept",)
METHODS = (
    Method("rank_jsd", "rank_jsd", "spo", 1, (*SUCCESSFUL, "actor.objective=rank_jsd")),
    Method("positive_ce", "positive_ce", "spo", 1, (*SUCCESSFUL, "actor.objective=positive_ce")),
    Method("spo_live", "spo, live target", "spo", 1, SUCCESSFUL),
    Method("spo_detached", "spo, detached target", "spo", 1, (*SUCCESSFUL, "actor.path.detach_target=true")),
    Method("spo_0p5_above", "spo_0p5, above a half", "spo_0p5", 1, SUCCESSFUL),
    Method("spo_0p5_all", "spo_0p5, all", "spo_0p5", 1, (*SUCCESSFUL, "actor.path.region=all")),
    Method("ppo", "ppo (Dr. GRPO)", "ppo", 4, ()),
    Method("sapo", "sapo", "ppo", 4, ("actor.objective=sapo",)),
    # with one update per rollout the ratio is 1, and sapo equals ppo
    Method("ppo_4", "ppo, 4 updates", "ppo", 4, ("actor.update_per_rollout=4",)),
    Method("sapo_4", "sapo, 4 updates", "ppo", 4, ("actor.update_per_rollout=4", "actor.objective=sapo")),
)


def read(folder: Path, title: str, greedy: list[float], sampled: list[float]) -> Row:
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in metrics if "actor/loss" in row]
    entropy = [row["train/entropy"] for row in steps]
    return Row(
        method=title,
        greedy=fmean(greedy),
        sampled=fmean(sampled),
        entropy=(fmean(entropy[:3]), fmean(entropy[-3:])),
        length=fmean(row["train/length"] for row in steps[-3:]),
        logp_gap_max=max(row["actor/logp_gap_max"] for row in steps if "actor/logp_gap_max" in row),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", default="5e-5", help="learning rate of all methods")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()

    board, out, env_path = ProgressBoard(), options.out, find_environment()
    plan = Plan(FULL.warmup_steps, options.steps, test_freq=options.steps, methods=METHODS)
    with board.progress:
        warm = out / "warm-up"
        if not (warm / "latest").is_dir():
            shutil.rmtree(out, ignore_errors=True)
            warm_start(plan, out, options.seed, board)
        jobs = []
        for method in METHODS:
            shutil.rmtree(out / method.name, ignore_errors=True)
            own = Method(
                method.name,
                method.title,
                method.program,
                method.responses_per_prompt,
                (*method.settings, f"actor.lr={options.lr}"),
            )
            jobs.append(method_job(own, plan, out, options.seed, env_path))
        run_jobs(jobs, num_cores(), JobBars(board))
        before, *after = evaluate(
            [warm / "latest", *(job.folder / "latest" for job in jobs)], out, env_path, options.seed, board
        )
    board.say("| method | greedy | sampled | entropy of rollouts | length | largest gap to the engine |")
    board.say("|---|---|---|---|---|---|")
    board.say(f"| warm start | {fmean(before.greedy):.1%} | {fmean(before.sampled):.1%} | | | |")
    for job, scores in zip(jobs, after, strict=True):
        row = read(job.folder, job.title, scores.greedy, scores.sampled)
        entropy = f"{row.entropy[0]:.3f} to {row.entropy[1]:.3f}"
        board.say(
            f"| {row.method} | {row.greedy:.1%} | {row.sampled:.1%} | {entropy} | {row.length:.1f} "
            f"| {row.logp_gap_max:.1e} |"
        )


if __name__ == "__main__":
    main()
