"""Cost in score and gain in time of training on stale samples, on the demo's task with long tails.

    python benchmarks/staleness.py [--seeds 3] [--steps 60] [--json FILE]

Word problems of the demo with 1 to 20 steps of calculation, so that responses have 12 to 200 tokens. A model of 245,000
parameters is warmed up on careless demonstrations, and SPO 3.2 continues from there: on-policy, with rollouts 1, 2 and
4 steps ahead of training, and with partial rollouts. Runs of one seed follow each other, so that load affects all
alike. On-policy, both phases have two threads, or one; ahead, each has one. Scores are greedy, on held-out problems.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean, median

from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problem, draw_problems, write_rows

ENVIRONMENT = Path(__file__).parents[1] / "envs" / "gsm8k.py"
COUNTS = range(1, 21)
WEIGHTS = [1 / n for n in COUNTS]
MAX_NEW_TOKENS = 220
PROMPTS = 128

MODES: dict[str, tuple[str, ...]] = {
    "on-policy": (),
    "on-policy, one thread": (),
    "1 ahead": ("rollout.max_staleness=1",),
    "2 ahead": ("rollout.max_staleness=2",),
    "4 ahead": ("rollout.max_staleness=4",),
    "partial, half more": ("rollout.max_staleness=2", "rollout.partial_rollout=0.5"),
}


def prepare(folder: Path, seed: int, warmup_steps: int) -> None:
    """Create the data and a warmed-up model of one seed."""
    folder.mkdir()
    draw = partial(draw_problems, draw=partial(draw_problem, counts=COUNTS, weights=WEIGHTS))
    rng, demonstrator = Random(f"{seed} demonstrator"), Demonstrator(traps=0.8, slip=0.01)
    pairs = [(p.question, demonstrator.solve(p, rng)) for p in draw(Random(f"{seed} warm-up"), 16_000, held_out=False)]
    build_model(folder / "model", [text for pair in pairs for text in pair], seed)
    write_rows(folder / "warmup.jsonl", [{"prompt": question, "response": answer} for question, answer in pairs])
    for name, number, held_out in (("train", 8_000, False), ("test", 256, True)):
        problems = draw(Random(f"{seed} {name}"), number, held_out=held_out)
        rows = [{"prompt": p.question, "extra_info": {"answer": str(p.answer)}} for p in problems]
        write_rows(folder / f"{name}.jsonl", rows)
    run(
        "sft",
        f"data.path={folder}/warmup.jsonl",
        "data.max_length=640",
        "data.batch_size=32",
        f"actor.model_name={folder}/model",
        "actor.max_length_per_device=32768",
        "actor.gradient_checkpointing=false",
        "actor.lr=3e-3",
        "actor.betas=[0.9,0.98]",
        "actor.scheduler=wsd",
        f"trainer.max_steps={warmup_steps}",
        "trainer.experiment_name=warm-up",
        f"trainer.save_dir={folder}/warm-up",
        f"trainer.seed={seed}",
    )


def train(folder: Path, mode: str, seed: int, steps: int) -> dict[str, float]:
    save_dir = folder / mode.replace(" ", "_").replace(",", "")
    run(
        "spo",
        f"train_data.path={folder}/train.jsonl",
        f"train_data.prompts_per_rollout={PROMPTS}",
        f"test_data.path={folder}/test.jsonl",
        f"actor.model_name={folder}/warm-up/latest",
        "actor.max_length_per_device=32768",
        "actor.gradient_checkpointing=false",
        "actor.average_over=kept",
        "actor.lr=1e-4",
        "actor.scheduler=linear",
        "actor.betas=[0.9,0.99]",
        "actor.weight_decay=0",
        f"rollout.train_sampling_params.max_new_tokens={MAX_NEW_TOKENS}",
        f"rollout.env_path={ENVIRONMENT}",
        f"trainer.max_steps={steps}",
        f"trainer.test_freq={steps}",
        "trainer.experiment_name=x",
        f"trainer.save_dir={save_dir}",
        f"trainer.seed={seed}",
        *MODES[mode],
        threads=1 if "one thread" in mode else 2,
    )
    rows = [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]
    steady = rows[steps // 4 : steps]
    numbers = {
        # a mean, because the wait varies between steps
        "step_s": fmean(row["time/step_s"] for row in steady),
        "before": rows[0]["test/score"],
        "after": rows[-1]["test/score"],
        "length": fmean(row["train/length"] for row in steady),
    }
    for name in sorted({name for row in steady for name in row if name.startswith("staleness/")}):
        numbers[name] = fmean(row[name] for row in steady)
    return numbers


def run(program: str, *overrides: str, threads: int = 2) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": f"{threads}", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", f"RL2.trainer.{program}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{program} failed:\n{done.stderr[-3000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup-steps", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(options.seeds):
            folder = Path(name) / f"{seed}"
            prepare(folder, seed, options.warmup_steps)
            for mode, of in results.items():
                of.append(train(folder, mode, seed, options.steps))
                print(seed, mode, {key: round(value, 3) for key, value in of[-1].items()}, flush=True)
    own = median(one["step_s"] for one in results["on-policy"])
    print("| | steps an hour | against on-policy | trajectories by age | score before | score after |")
    print("|---|---|---|---|---|---|")
    for mode, of in results.items():
        step_s = median(one["step_s"] for one in of)
        ages = [key for key in of[0] if key.startswith("staleness/") and key != "staleness/tokens"]
        histogram = ", ".join(f"{fmean(one[key] for one in of):.2f}" for key in ages) or "1"
        before, after = ([f"{one[key]:.3f}" for one in of] for key in ("before", "after"))
        columns = f"{3600 / step_s:.0f}", f"{own / step_s:.2f}", histogram, ", ".join(before), ", ".join(after)
        print(f"| {mode} | {' | '.join(columns)} |")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
