"""Packed attention with sliding windows against a model's own forward: an update and a rollout.

    python benchmarks/windows.py [--steps 3] [--threads 1]

Random models of 3.3 million parameters in float32, with a window of 64 positions. Sides alternate; times are medians
of CPU time, which other programs on the machine change little.

    packed       packed attention with the window
    no window    the same model with full attention, packed; not for Gemma 2, whose windows cannot be switched off
    rows         the model's own forward, row by row and in lockstep

The update is a forward and a backward pass over 64 sequences of 40 to 300 tokens: 8 prompts of 20 to 60 tokens with 8
samples each. The rollout has the same prompts and lengths of responses of up to 128 tokens.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from statistics import median
from typing import Any

import torch
from lockstep import seconds, task
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, PretrainedConfig, PreTrainedModel

from RL2.batch.packing import pack_tokens
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.models.policy import Policy
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import StatsRequest, TokenBatch

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 736,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
SAMPLES = 8


def models(window: int) -> dict[str, dict[str, PretrainedConfig]]:
    """Return the configurations of each model by side."""
    mistral, gemma2 = MistralConfig(**SHAPE, sliding_window=window), Gemma2Config(**SHAPE, sliding_window=window)
    return {
        "mistral": {"packed": mistral, "no window": MistralConfig(**SHAPE, sliding_window=None), "rows": mistral},
        "gemma2": {"packed": gemma2, "rows": gemma2},
    }


def built(config: PretrainedConfig, side: str) -> PreTrainedModel:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    if side != "rows":
        lm.set_attn_implementation(IMPLEMENTATION)
    return lm


def made_batch() -> TokenBatch:
    draw = random.Random(0)
    prompts, _ = task(SAMPLES)
    sequences = [prompt + [draw.randrange(512) for _ in range(draw.randint(20, 240))] for prompt in prompts]
    batch = pack_tokens(sequences)
    return batch.with_(group_B=torch.arange(len(sequences)) // SAMPLES)


def update_seconds(policy: Policy, batch: TokenBatch) -> float:
    begun = time.process_time()
    stats = policy.train()(batch, batch.shared(), StatsRequest(("logp",)))
    stats["logp"].mean().backward()
    policy.zero_grad()
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--window", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, (prompts, lengths) = made_batch(), task(SAMPLES)
    for name, sides in models(options.window).items():
        policies = {side: Policy(built(config, side)) for side, config in sides.items()}
        engines = {
            side: EmbeddedEngine(built(config, side), decode=str, max_running_requests=256, memory_share=0.3)
            for side, config in sides.items()
        }
        times: dict[tuple[str, str], list[float]] = {}
        for step in range(options.steps + 1):
            for side in sides:
                taken = update_seconds(policies[side], batch), seconds(engines[side], prompts, lengths)
                for what, time_s in zip(("update", "rollout"), taken, strict=True):
                    if step:  # the first is a warm-up
                        times.setdefault((what, side), []).append(time_s)
        for (what, side), of in times.items():
            ratio = median(of) / median(times[what, "packed"])
            print(f"{name:<9}{what:<9}{side:<11}{median(of):>8.3f} s {ratio:>7.2f}")


if __name__ == "__main__":
    main()
