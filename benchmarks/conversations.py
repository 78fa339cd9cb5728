"""Rollouts of several turns with the keys and values of earlier turns, and without.

    python benchmarks/conversations.py [--steps 3] [--model FOLDER]

Groups of 8 episodes of five turns: a prompt of 60 tokens, answers of 40 tokens, and 200 tokens of tool output behind
each answer but the last. A random Qwen3 of 3.3 million parameters, float32. Sides alternate in one process, so load
affects both alike: processor seconds and seconds, medians of ratios. Samples are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rl_step import write_model

from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.packed import PackedForward
from RL2.models.policy import load_model
from RL2.types import Completion, Sampling

GROUP, TURNS, PROMPT, ANSWER, OUTPUT = 8, 5, 60, 40, 200


async def episode(engine: EmbeddedEngine, group: int, seed: int) -> list[Completion]:
    """Play an episode; the tool's output depends on the seed alone."""
    draw = random.Random(group)
    vocabulary = engine.lm.config.vocab_size
    ids = [draw.randrange(vocabulary) for _ in range(PROMPT)]
    draw = random.Random(seed)
    turns = []
    for turn in range(TURNS):
        turns.append(await engine.generate(list(ids), Sampling(ANSWER, seed=seed * TURNS + turn)))
        ids += turns[-1].token_ids + [draw.randrange(vocabulary) for _ in range(OUTPUT)]
    return turns


def play(engine: EmbeddedEngine, groups: int, seed: int) -> list[Completion]:
    async def everything() -> list[list[Completion]]:
        episodes = (episode(engine, seed + n // GROUP, seed + n) for n in range(groups * GROUP))
        return await asyncio.gather(*episodes)

    return [turn for turns in asyncio.run(everything()) for turn in turns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--model", type=Path, help="folder of another model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engines = {}
    with tempfile.TemporaryDirectory() as name:
        if options.model is None:
            write_model(Path(name), end_probability=0.0, end=0, pad=0)
        for reuses in (False, True):
            lm = load_model(str(options.model or name), torch.float32)
            engines[reuses] = EmbeddedEngine(
                lm,
                decode=str,
                max_running_requests=256,
                memory_share=0.3,
                compiles=options.compile,
                reuses_prefixes=reuses,
            )
    ratios, differ = [], 0
    for step in range(options.steps + 1):
        seconds, found, positions = {}, {}, {}
        for reuses, engine in engines.items():
            assert isinstance(engine.model, PackedForward)
            before, begun = engine.model.prefilled, (time.process_time(), time.perf_counter())
            found[reuses] = play(engine, options.groups, seed=step * 10_000)
            seconds[reuses] = time.process_time() - begun[0], time.perf_counter() - begun[1]
            positions[reuses] = engine.model.prefilled - before
        if step:  # the first is a warm-up
            ratios.append([seconds[False][i] / seconds[True][i] for i in (0, 1)])
            pairs = zip(found[False], found[True], strict=True)
            differ += sum(a.token_ids != b.token_ids for a, b in pairs)
            print(f"  {seconds[False][0]:.2f} and {seconds[True][0]:.2f} processor seconds", flush=True)
    cpu, wall = (median(ratio[i] for ratio in ratios) for i in (0, 1))
    print(f"{cpu:.2f} times as fast (processor), {wall:.2f} (time); {differ} responses differ")
    print(f"positions of prompts: {positions[False]} and {positions[True]}")


if __name__ == "__main__":
    main()
