"""Generated tokens per processor second of the embedded engine with packed attention and with a model's own forward.

    python benchmarks/lockstep.py [--steps 3] [--threads 1]

The same random Qwen3 of 3.3 million parameters in float32 samples at temperature 1. Each response has its own length,
drawn from a long-tailed distribution and fixed for every side. Sides alternate; times are medians of processor time.

    dense        packed attention: requests of all lengths in one batch, without padding
    lockstep     the model's own forward and cache: requests of all lengths in one padded batch

Two tasks of 64 requests with prompts of 20 to 60 tokens: `groups` has 8 prompts with 8 samples each, `ragged` has 64
prompts.
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
from transformers import Qwen3ForCausalLM

from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.models.policy import load_model
from RL2.types import Sampling

REQUESTS, SAMPLES, VOCABULARY, CAP = 64, 8, 512, 128


def task(samples: int) -> tuple[list[list[int]], list[int]]:
    """Return the prompt of each request, each prompt `samples` times, and its number of tokens to generate."""
    draw = random.Random(0)
    distinct = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(20, 60))] for _ in range(REQUESTS // samples)]
    lengths = [min(CAP, max(1, round(draw.lognormvariate(3.7, 0.8)))) for _ in range(REQUESTS)]
    return [prompt for prompt in distinct for _ in range(samples)], lengths


def make_engines(folder: Path) -> dict[str, EmbeddedEngine]:
    """Return the engine of each side."""
    models = {
        "dense": load_model(str(folder), torch.float32),
        "lockstep": Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    }
    return {
        side: EmbeddedEngine(lm, decode=str, max_running_requests=256, memory_share=0.5) for side, lm in models.items()
    }


def seconds(engine: EmbeddedEngine, prompts: list[list[int]], lengths: list[int]) -> float:
    """Return the processor time that the engine takes for all requests, in seconds."""

    async def everything() -> None:
        requests = (
            engine.generate(prompt, Sampling(length, seed=i))
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        )
        for completion, length in zip(await asyncio.gather(*requests), lengths, strict=True):
            assert len(completion.token_ids) == length

    begun = time.process_time()
    asyncio.run(everything())
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), end_probability=0.0, end=0, pad=0)
        engines = make_engines(Path(name))
    for what, samples in (("groups", SAMPLES), ("ragged", 1)):
        prompts, lengths = task(samples)
        times: dict[str, list[float]] = {side: [] for side in engines}
        for step in range(options.steps + 1):
            for side, engine in engines.items():
                taken = seconds(engine, prompts, lengths)
                if step:  # the first is a warm-up
                    times[side].append(taken)
        rates = {side: sum(lengths) / median(of) for side, of in times.items()}
        for side, rate in rates.items():
            print(f"{what:<8}{side:<12}{rate:>8.0f} tokens/CPU-s {rates['dense'] / rate:>8.2f}")


if __name__ == "__main__":
    main()
