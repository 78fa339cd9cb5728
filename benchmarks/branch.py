"""Objectives ranked by measured credit, and `adv.estimator=branch` against Dr. GRPO, on the demo's task in miniature.

    python benchmarks/branch.py rank --out runs/branch
    python benchmarks/branch.py train --out runs/branch --figure docs/images/branch.svg

Both begin with a warm start for each seed: the demo's model of 245,000 parameters, its problems with one calculation,
and 240 steps of 16 demonstrations. The reward is 1 for an even number behind `####`. `rank` keeps the first step of a
run, measures the credit of its tokens with `rl2 credit`, and compares the order of the objectives between seeds.
`train` runs both estimators from the same start with the same prompts, and draws the held-out score against all tokens
that were sampled, continuations included.
Whatever is under OUT is used and not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from RL2.credit.agreement import kendall
from RL2.tools.jobs import Job, run_jobs
from RL2.tools.reproduce.demo import (
    MAX_NEW_TOKENS,
    JobBars,
    Plan,
    ProgressBoard,
    warmup_job,
    write_plan_data,
)
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import draw_problem

PLAN = Plan(
    warmup_steps=240,
    warmup_batch=16,
    steps=40,
    test_freq=20,
    methods=(),
    test_rows=128,
    sequences_per_step=64,
    draw=partial(draw_problem, counts=(1,), weights=(1.0,)),
)
EVEN = """import re


async def step(state, action, extra_info):
    number = re.search(r"#### ([0-9]+)$", action.replace("<|im_end|>", "").strip())
    reward = float(number is not None and int(number[1]) % 2 == 0)
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}
"""
"""Environment whose reward is 1 for an even number in the format: so weak a start hardly ever gets one right."""
METHODS = {
    "Dr. GRPO": ("train_data.responses_per_prompt=4",),
    "branch": (
        "train_data.responses_per_prompt=4",
        "adv.estimator=branch",
        "rollout.branch.places=unlikely",
        "rollout.branch.max_places=2",
        "rollout.branch.samples=2",
    ),
    "branch, trees": (
        "train_data.responses_per_prompt=4",
        "adv.estimator=branch",
        "rollout.branch.places=unlikely",
        "rollout.branch.max_places=2",
        "rollout.branch.samples=2",
        "rollout.branch.train=true",
    ),
}


def environment() -> dict[str, str]:
    """Return the variables of a job on one thread."""
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def warm(out: Path, seed: int, board: ProgressBoard) -> Path:
    """Return the folder of a seed, with data and a warm start in it."""
    folder = out / f"seed{seed}"
    if not (folder / "warm-up" / "done.json").exists():
        texts = write_plan_data(PLAN, folder, seed)
        build_model(folder / "model", texts, seed)
        run_jobs([warmup_job(PLAN, folder, seed, threads=1)], 1, JobBars(board))
    (folder / "even.py").write_text(EVEN)
    return folder


def job(folder: Path, name: str, seed: int, steps: int, *settings: str) -> Job:
    """Return a run of `ppo` from the warm start in `folder`."""
    save_dir = folder / name.replace(" ", "_").replace(",", "").replace(".", "")
    overrides = (
        f"train_data.path={folder}/data/train.jsonl",
        f"actor.model_name={folder}/warm-up/latest",
        "actor.max_length_per_device=8192",
        "actor.gradient_checkpointing=false",
        "actor.avg_level=constant",
        "actor.lr=1e-4",
        "actor.betas=[0.9,0.99]",
        "actor.weight_decay=0",
        "actor.warmup_ratio=0",
        f"rollout.train_sampling_params.max_new_tokens={MAX_NEW_TOKENS}",
        f"rollout.env_path={folder}/even.py",
        f"trainer.max_steps={steps}",
        f"trainer.experiment_name={save_dir.name}",
        f"trainer.save_dir={save_dir}",
        f"trainer.seed={seed}",
        *settings,
    )
    return Job(name, "ppo", overrides, save_dir, steps, environment=environment())


def rank(out: Path, seeds: Sequence[int], budget: str, board: ProgressBoard) -> list[str]:
    """Return lines: how well each objective agrees with measured credit, by seed, and how alike the orders are."""
    tables = []
    for seed in seeds:
        folder = warm(out, seed, board)
        kept = job(
            folder,
            "kept",
            seed,
            1,
            "train_data.prompts_per_rollout=8",
            "train_data.responses_per_prompt=3",
            "trainer.replay_freq=1",
            "trainer.samples_per_step=24",
        )
        if not (kept.folder / "done.json").exists():
            run_jobs([kept], 1, JobBars(board))
        command = [sys.executable, "-m", "RL2.tools.cli", "credit", str(kept.folder), "--step", "0"]
        command += ["--budget", budget, "--answers", "24"]
        subprocess.run(command, check=True, env=os.environ | environment())
        found = json.loads((kept.folder / "replay_000000" / "credit.json").read_text())
        tables.append({row["title"]: row for row in found["agreement"]})
    lines = []
    for measure in ("rank", "share"):
        values = [{t: row[measure][0] for t, row in table.items() if row.get(measure)} for table in tables]
        titles = [title for title in values[0] if all(title in of for of in values)]
        titles.sort(key=lambda title: -fmean(of[title] for of in values))
        lines += [f"{measure}: {t}: " + ", ".join(f"{of[t]:.3f}" for of in values) for t in titles]
        for a, b in combinations(range(len(seeds)), 2):
            tau = kendall(*([values[n][title] for title in titles] for n in (a, b)))
            lines.append(f"{measure}: Kendall's tau of seeds {seeds[a]} and {seeds[b]}: {tau:.2f}")
    return lines


def curve(folder: Path) -> tuple[list[float], list[float]]:
    """Return sampled tokens so far, continuations included, and the held-out score of each test of a run."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    used = [row.get("train/tokens", 0.0) + row.get("branch/tokens", 0.0) for row in rows]
    before = [total - own for total, own in zip(accumulate(used), used, strict=True)]
    tested = [(tokens, row["test/score"]) for tokens, row in zip(before, rows, strict=True) if "test/score" in row]
    return [tokens for tokens, _ in tested], [score for _, score in tested]


def train(
    out: Path, seeds: Sequence[int], steps: int, prompts: int, board: ProgressBoard
) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Return the curves of each method, one a seed."""
    found: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in METHODS}
    for seed in seeds:
        folder = warm(out, seed, board)
        for name, settings in METHODS.items():
            run = job(
                folder,
                name,
                seed,
                steps,
                f"train_data.prompts_per_rollout={prompts}",
                f"test_data.path={folder}/data/test.jsonl",
                "rollout.test_sampling_params.temperature=1",
                f"trainer.test_freq={max(1, steps // 5)}",
                *settings,
            )
            if not (run.folder / "done.json").exists():
                run_jobs([run], 1, JobBars(board))
            found[name].append(curve(run.folder))
    return found


def plot(found: dict[str, list[tuple[list[float], list[float]]]], file: Path) -> None:
    """Draw the held-out score against sampled tokens: a thin line a seed, a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for number, (name, curves) in enumerate(found.items()):
        color = f"C{number}"
        for tokens, scores in curves:
            axes.plot([x / 1000 for x in tokens], scores, color=color, alpha=0.3, linewidth=1)
        means = [[fmean(each) for each in zip(*axis, strict=True)] for axis in zip(*curves, strict=True)]
        axes.plot([x / 1000 for x in means[0]], means[1], color=color, marker="os^"[number], label=name)
    axes.set(xlabel="sampled tokens, thousands", ylabel="held-out score at temperature 1")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rank", "train"))
    parser.add_argument("--out", type=Path, default=Path("runs/branch"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", default="15k", help="tokens of `rl2 credit` for a seed")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    seeds, board = [int(seed) for seed in options.seeds.split(",")], ProgressBoard()
    if options.what == "rank":
        print("\n".join(rank(options.out, seeds, options.budget, board)))
        return
    found = train(options.out, seeds, options.steps, options.prompts, board)
    for name, curves in found.items():
        for seed, (tokens, scores) in zip(seeds, curves, strict=True):
            shown = ", ".join(f"{x / 1000:.1f}k: {y:.3f}" for x, y in zip(tokens, scores, strict=True))
            print(f"{name}, seed {seed}: {shown}")
    if options.figure:
        plot(found, options.figure)


if __name__ == "__main__":
    main()
