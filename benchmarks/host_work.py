"""Seconds of one core that a step of reinforcement learning spends on its responses, beside models and engine.

    python benchmarks/host_work.py [--responses 512] [--longest 8192] [--json FILE]

Responses of up to 8,192 tokens (2.5 M tokens) take the way of a step: from the engine's lists into sequences, to the
other processes and back (pickled; every process reads all of them), filters and metrics, packing, weights, advantages,
the plan of microbatches, and their slices with the prefixes that they share. Medians of several runs.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from RL2.batch.advantages import reward_of_sequences
from RL2.batch.packing import loss_weights, microbatches, minibatches, pack
from RL2.rollout.continuation import append
from RL2.rollout.filters import success_rates
from RL2.rollout.metrics import drop_equal_groups, rollout_metrics, staleness
from RL2.types import Completion, Sequence, Trajectory

PROMPT, GROUP = 100, 8


def completions(number: int, longest: int) -> list[Completion]:
    """Return responses of 1/5 of `longest` to all of it, as an engine returns them."""
    draw = random.Random(0)
    found = []
    for _ in range(number):
        length = draw.randint(longest // 5, longest)
        ids = [draw.randrange(150_000) for _ in range(length)]
        logps = [-draw.random() for _ in range(length)]
        found.append(Completion(ids, logps, "stop", [7] * length))
    return found


def trajectories_of(found: list[Completion]) -> list[Trajectory]:
    prompts = [[random.Random(g).randrange(150_000) for _ in range(PROMPT)] for g in range(len(found) // GROUP + 1)]
    made = []
    for n, completion in enumerate(found):
        sequence = Sequence([], [], [], [])
        append(sequence, prompts[n // GROUP])
        append(sequence, completion.token_ids, completion.logps, completion.versions)
        sequence.rewards[-1] = float(n % 3 == 0)
        made.append(Trajectory(n // GROUP, n // GROUP, n % GROUP, [sequence], texts=["a", "b"]))
    return made


class Clock:
    """Seconds of this process's processor time, by the name of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self.seconds[name] = time.process_time() - begun


def step(found: list[Completion]) -> dict[str, float]:
    """Do the host's work of one step; return its seconds by name."""
    clock = Clock()
    with clock.time("sequences of the engine's lists"):
        made = trajectories_of(found)
    with clock.time("pickle"):
        sent = pickle.dumps(made)
    with clock.time("unpickle"):
        made = pickle.loads(sent)
    with clock.time("filters and metrics"):
        kept = drop_equal_groups(made)
        success_rates(made)
        rollout_metrics(made, "train")
        staleness(made, 8, 2)
        sum(trajectory.num_tokens for trajectory in made)
    with clock.time("pack"):
        batch = pack(kept, 8)
        _ = batch.largest_token_id
    with clock.time("weights and rewards"):
        batch = batch.with_(weight_T=loss_weights(batch, level="sequence"))
        reward_of_sequences(batch)
    with clock.time("microbatches"):
        for ids in minibatches(batch, 2):
            for of_rank in microbatches(batch.sequences(ids), range(len(ids)), 32_768, 1):
                for chosen in of_rank:
                    batch.sequences([ids[b] for b in chosen]).shared()
    clock.seconds["all"] = sum(clock.seconds.values())
    return clock.seconds


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--responses", type=int, default=512)
    options.add_argument("--longest", type=int, default=8192)
    options.add_argument("--runs", type=int, default=5)
    options.add_argument("--json", type=Path, help="write the numbers to this file")
    arguments = options.parse_args()
    found = completions(arguments.responses, arguments.longest)
    print(f"{sum(len(completion.token_ids) for completion in found):,} tokens in {len(found)} responses", flush=True)
    runs = [step(found) for _ in range(arguments.runs)]
    seconds = {name: median(run[name] for run in runs) for name in runs[0]}
    for name, spent in seconds.items():
        print(f"  {name:<34}{spent:>8.3f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(seconds, indent=1))


if __name__ == "__main__":
    main()
