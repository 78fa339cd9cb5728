"""Generated tokens per second on a GPU: the embedded engine, its parts, and transformers.

    python benchmarks/gpu_rollout.py [--sides rl2 generate ...] [--json FILE]

A random Qwen3 of 0.6 billion parameters in bfloat16; 32 prompts of 100 to 300 tokens with 8 responses each. Response
lengths are drawn from a long-tailed distribution (log-normal, median 200 tokens, at most 1,024) and fixed for every
side; there is no end token. Sides run in sequence: the first two three times after a warm-up (medians), the others,
which take a minute, once.

    rl2          the embedded engine: pages, recorded steps, compiled layers
    no compile   the same without compiled layers
    no graphs    also without recorded steps: Python launches each kernel
    dense        one block of memory per layer instead of pages, as on CPUs
    continuous   transformers' continuous batching
    generate     transformers' generate, all prompts in one batch, which runs until its longest response ends
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_update import HIDDEN_SIZES, qwen3
from transformers import Qwen3ForCausalLM

from RL2.engines.embedded.cache import Cache
from RL2.engines.embedded.dense import DenseCache
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.packed import PackedForward
from RL2.engines.embedded.paged import PagedCache
from RL2.engines.memory import free_bytes
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import Sampling

GROUPS, SAMPLES, MEDIAN, CAP, VOCABULARY = 32, 8, 200, 1024, 151_936
MEMORY_SHARE = 0.4


def task() -> tuple[list[list[int]], list[int]]:
    draw = random.Random(0)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(100, 300))] for _ in range(GROUPS)]
    lengths = [min(CAP, max(1, round(draw.lognormvariate(math.log(MEDIAN), 0.8)))) for _ in range(GROUPS * SAMPLES)]
    return [prompt for prompt in prompts for _ in range(SAMPLES)], lengths


def make_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    with torch.device("cuda"):
        lm = Qwen3ForCausalLM(qwen3(HIDDEN_SIZES["0.6B"])).eval().requires_grad_(False)
    for parameter in lm.parameters():  # the rotary frequencies stay float32
        parameter.data = parameter.data.bfloat16()
    return lm


class WithoutGraphs(EmbeddedEngine):
    def _new_cache(self) -> Cache:
        cache = super()._new_cache()
        assert isinstance(cache, PagedCache) and cache.graphs is not None
        cache.graphs.can_record = False
        return cache


class Dense(EmbeddedEngine):
    def _new_cache(self) -> Cache:
        assert isinstance(self.model, PackedForward)
        return DenseCache(self.model, self.memory_share * free_bytes(self.device))


def embedded(lm: Qwen3ForCausalLM, kind: type[EmbeddedEngine], compiles: bool = False) -> list[list[int]]:
    lm.set_attn_implementation(IMPLEMENTATION)
    engine = kind(
        lm,
        decode=str,
        max_running_requests=GROUPS * SAMPLES,
        memory_share=MEMORY_SHARE,
        compiles=compiles,
    )

    async def everything() -> list[list[int]]:
        requests = (
            engine.generate(prompt, Sampling(length, seed=i))
            for i, (prompt, length) in enumerate(zip(*task(), strict=True))
        )
        return [completion.token_ids for completion in await asyncio.gather(*requests)]

    return asyncio.run(everything())


def continuous(lm: Qwen3ForCausalLM) -> list[list[int]]:
    from transformers import GenerationConfig

    lm.set_attn_implementation("sdpa")
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=CAP, eos_token_id=-1, pad_token_id=0)
    manager = lm.init_continuous_batching(generation_config=settings)
    manager.start()
    prompts, lengths = task()
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        manager.add_request(prompt, request_id=f"{number}", max_new_tokens=length)
    answers: dict[int, list[int]] = {}
    while len(answers) < len(prompts):
        result = manager.get_result(timeout=60)
        assert result is not None and not result.error, result
        answers[int(result.request_id)] = result.generated_tokens
    manager.stop(block=True)
    return [answers[number] for number in range(len(prompts))]


def generate(lm: Any) -> list[list[int]]:
    lm.set_attn_implementation("sdpa")
    prompts, lengths = task()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device="cuda")
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device="cuda")
    out = lm.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=max(lengths),
        eos_token_id=None,
        pad_token_id=0,
    )
    return [row[width : width + n].tolist() for row, n in zip(out, lengths, strict=True)]


SIDES: dict[str, Callable[[Qwen3ForCausalLM], list[list[int]]]] = {
    "rl2": lambda lm: embedded(lm, EmbeddedEngine, compiles=True),
    "no compile": lambda lm: embedded(lm, EmbeddedEngine),
    "no graphs": lambda lm: embedded(lm, WithoutGraphs),
    "dense": lambda lm: embedded(lm, Dense),
    "generate": generate,
    "continuous": continuous,
}

REPEATED = ("rl2", "no compile")


def measure(side: str, lm: Qwen3ForCausalLM) -> tuple[float, float]:
    """Return seconds, and GiB beyond the model."""
    seconds = []
    for _ in range(4 if side in REPEATED else 1):
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, begun = torch.cuda.memory_allocated(), time.perf_counter()
        answers = SIDES[side](lm)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        assert [len(answer) for answer in answers] == task()[1], "a side did not generate the requested lengths"
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return median(seconds[1:] or seconds), peak


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--json", type=Path, help="write the numbers to this file")
    options.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    arguments = options.parse_args()
    lm = make_model()
    tokens = sum(task()[1])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tokens} tokens in {GROUPS * SAMPLES} responses")
    numbers: dict[str, float] = {}
    for side in arguments.sides:
        if side != "rl2":
            lm = make_model()  # compiled code is kept between sides
        try:
            seconds, peak = measure(side, lm)
        except Exception as error:  # a peer that cannot run here must not affect the other sides
            if not side.startswith(("gen", "con")):
                raise
            print(f"  {side:<12} {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        numbers[f"{side}_tokens_per_s"] = tokens / seconds
        ratio = numbers.get("rl2_tokens_per_s", math.nan) / numbers[f"{side}_tokens_per_s"]
        print(
            f"  {side:<12}{seconds:>8.2f} s{tokens / seconds:>10.0f} tokens/s{ratio:>7.2f}{peak:>8.1f} GiB", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
