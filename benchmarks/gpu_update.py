"""One optimizer step on a GPU: tokens per second, share of the peak, and memory.

    python benchmarks/gpu_update.py [--json FILE]

Random Qwen3 of 0.6 and 1.7 billion parameters, bfloat16 with float32 master weights, packed microbatches of 8,192
positions, four per step, sequences of 2,048 and of 512; `ppo` with entropy, so that both passes use the whole
vocabulary. The share is of 989 TFLOP/s (dense bfloat16 of an H100 or H200) and counts 6 operations per parameter and
token plus causal attention, without recomputation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from RL2.batch.packing import pack
from RL2.config.load import load
from RL2.parallel.processes import Processes
from RL2.types import Sequence, Trajectory
from RL2.workers.actor import Actor

PEAK = 989e12
POSITIONS, MICROBATCHES = 8192, 4
HIDDEN_SIZES = {"0.6B": 1024, "1.7B": 2048}


def qwen3(hidden_size: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=28,
    )


def measure(hidden_size: int, length: int, checkpointing: bool, steps: int, processes: Processes) -> dict[str, float]:
    config = qwen3(hidden_size)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("cuda"):
            lm = Qwen3ForCausalLM(config).bfloat16()
        parameters = sum(p.numel() for p in lm.parameters())
        lm.save_pretrained(folder)
        del lm
        overrides = f"""actor.model_name={folder} actor.max_length_per_device={POSITIONS} actor.entropy.coef=0.001
            actor.gradient_checkpointing={str(checkpointing).lower()} train_data.path=x train_data.prompts_per_rollout=2
            rollout.env_path=x rollout.train_sampling_params.max_new_tokens=1 trainer.experiment_name=x"""
        actor = Actor(load("ppo", overrides.split()).actor, processes, 100, Path(folder))
    g = torch.Generator().manual_seed(0)
    trajectories = []
    for n in range(POSITIONS * MICROBATCHES // length):
        ids = torch.randint(config.vocab_size, (length + 1,), generator=g).tolist()
        zeros = [0.0] * (length + 1)
        trajectories.append(Trajectory(n, n, 0, [Sequence(ids, [False] + [True] * length, zeros, zeros)]))
    batch = pack(trajectories)
    batch = batch.with_(advantage_T=torch.randn(len(batch.labels_T), generator=g))
    batch = batch.with_(engine_logp_T=torch.full(batch.labels_T.shape, -12.0))
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps + 2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        actor.update(batch)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    step_s, tokens = median(seconds[2:]), POSITIONS * MICROBATCHES
    # scores and values of the tokens before each: 2 products of 2 operations, three times with the backward pass
    attention = 3 * 2 * 2 * config.num_attention_heads * config.head_dim * length / 2 * config.num_hidden_layers
    share = (6 * parameters + attention) * tokens / step_s / PEAK
    peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return {"step_s": step_s, "tokens_per_s": tokens / step_s, "utilisation": share, "peak_gib": peak_gib}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    processes = Processes.start(600)
    results = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {POSITIONS * MICROBATCHES} tokens a step")
    print("model  length  recompute   step, s   tokens/s  of the peak  memory, GiB")
    for name, hidden_size in HIDDEN_SIZES.items():
        for length, checkpointing in ((2048, False), (512, False), (2048, True)):
            numbers = measure(hidden_size, length, checkpointing, options.steps, processes)
            results[f"{name} {length} {'recomputed' if checkpointing else 'kept'}"] = numbers
            print(
                f"{name:6}{length:7}  {'yes' if checkpointing else 'no':9}{numbers['step_s']:10.3f}"
                f"{numbers['tokens_per_s']:11.0f}{numbers['utilisation']:13.1%}{numbers['peak_gib']:13.1f}",
                flush=True,
            )
            torch.cuda.empty_cache()
    processes.stop()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
