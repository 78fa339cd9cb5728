"""Self-distillation with hints on a pretrained model of 135M parameters: held-out accuracy on sums before and after.

    python benchmarks/hints.py [--steps 12] [--hints answer format] [--out runs/hints]

The task is "What is 7 + 15?", for two numbers from 2 to 20; 40 of the 361 pairs are held out for the test, which is
greedy, with at most 16 tokens. The program `distill` samples one response to each of 16 prompts a step. The teacher is
the frozen start at temperature 0.5, which reads a hint after the question: `answer` is the solution of this question,
and `format` a solved example that is the same for all, as a control. No reward trains.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from random import Random

import torch

from RL2.io.jsonl import read_records
from RL2.tools.jobs import Job, run_jobs
from RL2.tools.reproduce.demo import JobBars, ProgressBoard, num_cores
from RL2.tools.reproduce.problems import write_rows
from RL2.tools.reproduce.smollm2 import smollm2

HINTS = {"answer": "f\"{extra_info['a']} + {extra_info['b']} = {extra_info['answer']}\"", "format": "'5 + 24 = 29'"}
"""Kind of hint -> expression of it in the environment's script."""

ENVIRONMENT = """
import re


async def step(state, action, extra_info):
    numbers = re.findall(r"\\d+", action)
    reward = float(numbers[-1:] == [str(extra_info["answer"])])
    return {{"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}}


def hint(extra_info):
    return {hint}
"""


def write_sums(folder: Path) -> None:
    """Write train.jsonl and test.jsonl, and an environment for each kind of hint, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in range(2, 21) for b in range(2, 21)]
    Random(0).shuffle(pairs)
    for name, chosen in (("test", pairs[:40]), ("train", pairs[40:])):
        write_rows(
            folder / f"{name}.jsonl",
            (
                {
                    "messages": [{"role": "user", "content": f"What is {a} + {b}?"}],
                    "extra_info": {"a": a, "b": b, "answer": a + b},
                }
                for a, b in chosen
            ),
        )
    for name, hint in HINTS.items():
        (folder / f"{name}.py").write_text(ENVIRONMENT.format(hint=hint))


def hint_job(kind: str, model: Path, out: Path, steps: int, lr: str) -> Job:
    """Return the job that distils from the start with hints of a kind."""
    folder = out / kind
    overrides = (
        f"train_data.path={out}/data/train.jsonl",
        "train_data.prompts_per_rollout=16",
        f"test_data.path={out}/data/test.jsonl",
        f"actor.model_name={model}",
        "actor.max_length_per_device=1024",
        "actor.gradient_checkpointing=false",
        f"actor.lr={lr}",
        "teacher.model_name=start",
        "teacher.hint=true",
        "teacher.temperature=0.5",
        f"rollout.env_path={out}/data/{kind}.py",
        "rollout.train_sampling_params.max_new_tokens=16",
        f"trainer.max_steps={steps}",
        f"trainer.test_freq={max(1, steps // 2)}",
        "trainer.token_stats_freq=null",
        f"trainer.experiment_name={kind}",
        f"trainer.save_dir={folder}",
    )
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return Job(f"hint: {kind}", "distill", overrides, folder, steps, environment=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", default="3e-5")
    parser.add_argument("--hints", nargs="+", choices=HINTS, default=["answer"])
    parser.add_argument("--out", type=Path, default=Path("runs/hints"))
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)

    board, out = ProgressBoard(), options.out
    write_sums(out / "data")
    jobs = [hint_job(kind, smollm2(), out, options.steps, options.lr) for kind in options.hints]
    with board.progress:
        run_jobs([job for job in jobs if not job.is_done], num_cores(), JobBars(board))
    board.say(f"{platform.processor() or platform.machine()}, {num_cores()} cores")
    for job in jobs:
        tests = [row for row in read_records(job.folder / "metrics.jsonl") if "test/score" in row]
        scores = ", ".join(f"step {row['step']} {row['test/score']:.1%}" for row in tests)
        board.say(f"{job.title}, {job.seconds:.0f} s: {scores}")


if __name__ == "__main__":
    main()
