"""Accuracy of a run's warnings on sick and healthy runs: 20 steps on the demo's task, on one CPU core.

    python benchmarks/alarms.py runs/demo [--only WORD]

`runs/demo` is the folder of `rl2 demo`. All runs begin with its warmed-up model. The sick runs have a planted fault.
The healthy runs are four methods that improve on this task, each with five seeds or learning rates. SPO 3.3 is not
among them: it loses score here (docs/measurements.md) and triggers a warning.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

STEPS = 20
GSM8K = Path(__file__).parents[1] / "envs" / "gsm8k.py"
ENVIRONMENT = """
async def step(state, action, extra_info):
    reward = float({reward})
    return dict(next_state=None, reward=reward, score=reward, done=True, extra_info=extra_info)
"""
IMPORTED = ["RL2.trainer.run", "RL2.trainer.rl", "transformers.models.qwen3.modeling_qwen3"]


class Case(NamedTuple):
    """A run: what it demonstrates, its program, the reward if it replaces the task's, and its settings."""

    name: str
    program: str
    reward: str
    settings: tuple[str, ...]


def case(name: str, program: str, reward: str = "", *settings: str) -> Case:
    return Case(name, program, reward, settings)


SHORT = "rollout.train_sampling_params.max_new_tokens=6"
LONG = "rollout.train_sampling_params.max_new_tokens=200"
COLD = "rollout.train_sampling_params.temperature=0.01"
SICK = (
    case("nothing learned: no reward", "ppo", "0"),
    case("nothing learned: no reward", "spo", "0"),
    case("nothing learned: rewards below 0", "spo", "-1"),
    case("nothing learned: reward of the prompt alone", "ppo", "len(state) % 2"),
    case("all truncated: no answer fits", "ppo", "", SHORT),
    case("all truncated: no answer fits", "spo", "", SHORT),
    case("all truncated: half an answer pays", "ppo", "'1' in action", SHORT),
    case("rate too high: 1", "ppo", "", "actor.lr=1"),
    case("rate too high: 1", "spo", "", "actor.lr=1"),
    case("rate too high: 0.1", "spo_0p5", "", "actor.lr=0.1"),
    case("rate too high: 0.03", "ppo", "", "actor.lr=0.03"),
    case("collapse: one digit pays", "ppo", "action.count('7') / 10", "actor.lr=3e-3"),
    case("collapse: one digit pays", "ppo", "'99' in action", "actor.lr=3e-3"),
    case("collapse: cold samples", "ppo", "", COLD),
    case("collapse: cold samples", "spo", "", COLD),
    case("reward hacking: long responses pay", "ppo", "len(action) / 100", LONG, "actor.lr=2e-3"),
    case("reward hacking: many words pay", "ppo", "len(action.split()) / 20", LONG, "actor.lr=2e-3"),
    case("reward hacking: short responses pay", "ppo", "1 / (1 + len(action))", "actor.lr=2e-3"),
    case("constant reward", "ppo", "1"),
    case("constant reward", "spo", "0.5"),
)
METHODS = {
    "Dr. GRPO": ("ppo", ("actor.lr=1e-4",)),
    "SPO 3.1": ("spo", ("actor.lr=5e-5",)),
    "SPO 3.2": ("spo", ("actor.average_over=kept", "actor.lr=1e-4")),
    "positive CE": ("spo", ("actor.objective=positive_ce", "actor.average_over=kept", "actor.lr=1e-4")),
}
HEALTHY = tuple(
    case(f"{name}, {change}", program, "", *settings, change)
    for name, (program, settings) in METHODS.items()
    for change in ("trainer.seed=1", "trainer.seed=2", "trainer.seed=3", "trainer.seed=4", "actor.lr=2e-5")
)


def settings_of(each: Case, demo: Path, folder: Path) -> list[str]:
    """Return the overrides of a run that writes to `folder`."""
    environment = folder / "environment.py"
    if each.reward:
        environment.write_text(ENVIRONMENT.format(reward=each.reward))
    group = 4 if each.program == "ppo" else 1
    return [
        f"train_data.path={demo}/data/train.jsonl",
        f"train_data.prompts_per_rollout={128 // group}",
        f"train_data.responses_per_prompt={group}",
        f"test_data.path={demo}/data/test.jsonl",
        f"actor.model_name={demo}/warm-up/latest",
        "actor.max_length_per_device=32768",
        "actor.gradient_checkpointing=false",
        "actor.weight_decay=0",
        "rollout.train_sampling_params.max_new_tokens=36",
        f"rollout.env_path={environment if each.reward else GSM8K}",
        f"trainer.max_steps={STEPS}",
        "trainer.test_freq=10",
        "trainer.experiment_name=alarms",
        f"trainer.save_dir={folder}/run",
        *each.settings,
    ]


def train(program: str, settings: list[str], log: str) -> None:
    """Run `program` in this process, with its output in the file `log`."""
    import os
    import sys

    import torch

    torch.set_num_threads(1)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [program, *settings]
    from RL2.trainer.launch import main as launch

    launch(program)


def warnings_of(each: Case, demo: Path) -> tuple[list[tuple[int, str]], int]:
    """Return the warnings of a run with their steps, and the number of steps that it took."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        context = get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        log = folder / "log"
        process = context.Process(target=train, args=(each.program, settings_of(each, demo, folder), str(log)))
        process.start()
        process.join()
        said = log.read_text()
        found = [(int(step), words) for step, words in re.findall(r"step (\d+): WARNING: (.*)", said)]
        if process.exitcode:  # a run that stops with an error reports more than a warning
            found.append((0, f"stopped: {said.splitlines()[-1]}"))
        metrics = folder / "run" / "metrics.jsonl"
        return found, len(metrics.read_text().splitlines()) if metrics.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of rl2 demo")
    parser.add_argument("--only", default="", help="only runs whose name contains this word")
    given = parser.parse_args()
    for title, cases in (("sick", SICK), ("healthy", HEALTHY)):
        chosen = [each for each in cases if given.only in each.name]
        warned = 0
        print(f"| {title} | program | steps | first warning |\n|---|---|---|---|")
        for each in chosen:
            found, steps = warnings_of(each, given.demo.resolve())
            warned += bool(found)
            first = f"step {found[0][0]}: {found[0][1]}" if found else "none"
            print(f"| {each.name} | {each.program} | {steps} | {first} |", flush=True)
        print(f"\n{warned} of {len(chosen)} {title} runs had a warning\n", flush=True)


if __name__ == "__main__":
    main()
