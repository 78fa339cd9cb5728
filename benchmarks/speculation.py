"""Rollouts with drafts and without: the same engine, model, prompts and seeds (rollout.speculation).

    python -m RL2.tools.reproduce.demo --quick --out demo
    python benchmarks/speculation.py --demo demo [--steps 5] [--compile]
    python benchmarks/speculation.py --copying FOLDER [--steps 5]
    python benchmarks/speculation.py --passes

Groups of 8 samples, float32. Two tasks:

    demo      word problems of the demo, by its model after the warm-up (DEMO/warm-up/latest)
    copying   prompts of 64 random tokens twice, which a model continues that was trained to repeat its prompt (made in
              FOLDER if it is not there, in some minutes)

Sides alternate in one process, so load affects both alike: processor seconds and seconds, medians. Every step has new
seeds. It also counts the requests whose tokens differ from those without drafts, and the largest difference of a
log-probability.

`--passes` compares the processor time of a pass that verifies 1 to 8 guesses per request with that of a pass without,
for a model of the demo's size, at position 90.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from RL2.engines.embedded.dense import DenseCache
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.packed import PackedForward
from RL2.models.policy import load_model
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import Completion, Sampling

GROUP, PERIOD = 8, 64
GUESSES = (0, 1, 2, 4, 8)
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}
"""The demo's model."""


def copying_model(folder: Path) -> None:
    """Train a model to continue random tokens that repeat."""
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    steps = 1500
    for step in range(steps):
        longest, tokens = (24, 96) if step < steps // 3 else (PERIOD, 160)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50, (steps - step) / (steps // 3))
        period = random.Random(step).randint(6, longest - 1)
        ids_BL = torch.randint(10, 510, (24, period)).repeat(1, tokens // period + 2)[:, :tokens]
        logits_BLV = lm(input_ids=ids_BL).logits[:, period - 1 : -1]
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, period:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"  step {step + 1}: loss {loss:.3f}", flush=True)
    lm.save_pretrained(folder)


def copying(num_prompts: int) -> tuple[list[list[int]], Sampling]:
    draw = random.Random(0)
    prompts = [[draw.randrange(10, 510) for _ in range(PERIOD)] * 2 for _ in range(num_prompts)]
    return prompts, Sampling(128)


def word_problems(demo: Path, num_prompts: int) -> tuple[list[list[int]], Sampling]:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    rows = [json.loads(line) for line in (demo / "data" / "train.jsonl").read_text().splitlines()[:num_prompts]]
    texts = (tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False) for row in rows)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return prompts, Sampling(36, stop_token_ids=(tokenizer.eos_token_id,))


def passes(rows: int) -> None:
    """Print the time of a pass with each number of guesses per row, relative to one without."""
    lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    lm.set_attn_implementation(IMPLEMENTATION)
    cache = DenseCache(PackedForward(lm, compiles=False), 1e9, max(GUESSES))
    cache.reserve([101] * rows, 0, 200, rows)
    seconds: dict[int, list[float]] = {number: [] for number in GUESSES}
    with torch.no_grad():
        cache.prefill({tuple(range(80)): list(range(rows))})
        for _ in range(12):
            for number in GUESSES:
                begun = time.process_time()
                if number:
                    cache.verify([[5] * (number + 1)] * rows, [90] * rows)
                else:
                    cache.decode([5] * rows, [90] * rows)
                seconds[number].append(time.process_time() - begun)
    plain = median(seconds[0])
    shares = ", ".join(f"{number}: {median(of) / plain:.2f}" for number, of in seconds.items() if number)
    print(f"{rows:>4} requests: {1000 * plain:.2f} ms without guesses; with guesses per request {shares} times that")


def run(engine: EmbeddedEngine, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
    async def everything() -> list[Completion]:
        requests = [
            engine.generate(prompt, replace(sampling, seed=seed + i * GROUP + n))
            for i, prompt in enumerate(prompts)
            for n in range(GROUP)
        ]
        return await asyncio.gather(*requests)

    return asyncio.run(everything())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="folder of a demo")
    parser.add_argument("--copying", type=Path, help="folder of a model that repeats its prompt")
    parser.add_argument("--passes", action="store_true", help="time passes alone")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--running", type=int, nargs="+", default=[8, 64, 256], help="requests that run at a time")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--modes", nargs="+", default=["off", "auto"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.passes:
        for rows in options.running:
            passes(rows)
        return
    if options.copying:
        if not options.copying.exists():
            copying_model(options.copying)
        folder, (prompts, sampling) = options.copying, copying(options.prompts)
    else:
        folder, (prompts, sampling) = options.demo / "warm-up" / "latest", word_problems(options.demo, options.prompts)
    sampling = replace(sampling, temperature=options.temperature)
    for running in options.running:
        engines = {
            mode: EmbeddedEngine(
                load_model(str(folder), torch.float32),
                decode=str,
                max_running_requests=running,
                memory_share=0.2,
                compiles=options.compile,
                speculation=mode,
            )
            for mode in options.modes
        }
        compare(engines, prompts, sampling, options.steps, running)


def compare(
    engines: dict[str, EmbeddedEngine], prompts: list[list[int]], sampling: Sampling, steps: int, running: int
) -> None:
    times: dict[str, list[tuple[float, float]]] = {mode: [] for mode in engines}
    found: dict[str, list[Completion]] = {mode: [] for mode in engines}
    for step in range(steps + 1):
        for mode, engine in engines.items():
            begun = time.process_time(), time.perf_counter()
            completions = run(engine, prompts, sampling, seed=step * 1_000_000)
            spent = time.process_time() - begun[0], time.perf_counter() - begun[1]
            if step:  # the first is a warm-up
                times[mode].append(spent)
                found[mode] += completions
            else:
                engine.metrics()
    off, *others = engines
    for mode in others:
        pairs = list(zip(found[off], found[mode], strict=True))
        differ = sum(a.token_ids != b.token_ids for a, b in pairs)
        same = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
        gap = max(abs(x - y) for a, b in same for x, y in zip(a.logps, b.logps, strict=True))
        cpu, wall = (median(a[i] / b[i] for a, b in zip(times[off], times[mode], strict=True)) for i in (0, 1))
        numbers = engines[mode].metrics()
        print(
            f"{running:>4} running {mode:>7}: {cpu:.2f} times as fast (processor), {wall:.2f} (time); "
            f"{numbers['engine/drafted']:.0f} drafted, {numbers['engine/accepted']:.0f} accepted, "
            f"{numbers['engine/accepted_share']:.2f} of the tokens; "
            f"{differ} of {len(pairs)} requests differ, log-probabilities by up to {gap:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
