"""Gap between trainer and engine of a mixture of experts in bfloat16, with and without router replay.

    python benchmarks/router_replay.py [--experts 4 16 64] [--threads 1]

Random models of 4 layers and hidden size 128 sample 64 responses of up to 64 tokens with the embedded engine, and the
trainer computes the log-probabilities of these tokens, both in bfloat16. The mixtures of experts (Qwen3-MoE, 2 experts
of a token) sample with their own forward and record experts; the dense model is a Qwen3 of the same sizes, on the same
path. The gap is the mean of abs(trainer's logp - engine's logp). Routes that differ are experts of the engine that the
trainer would not choose, in the mean over layers and tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from RL2.batch.packing import pack
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.models.policy import Policy
from RL2.models.routing import RoutingSums
from RL2.ops.attention import is_packed
from RL2.types import Completion, Sampling, Sequence, StatsRequest, TokenBatch, Trajectory
from RL2.workers.passes import statistics

PROMPTS, SAMPLES, LENGTH = 16, 4, 64
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def configuration(experts: int) -> PretrainedConfig:
    """Return a configuration with this number of experts; 0 is the dense model, with a window beyond every length."""
    if experts:
        sizes: dict[str, Any] = {
            "num_experts": experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 192,
            "norm_topk_prob": True,
        }
        return Qwen3MoeConfig(**SIZES, **sizes)
    return Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4096, max_window_layers=0)


def rollout(engine: EmbeddedEngine) -> TokenBatch:
    """Return sampled responses as a batch, with the engine's log-probabilities and experts."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 40, (PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(512, (length,), generator=generator).tolist() for length in lengths]
    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]

    async def everything() -> list[Completion]:
        limits = [LENGTH - 3 * (n % 16) for n in range(len(asked))]
        return await asyncio.gather(
            *(
                engine.generate(p, Sampling(limit, seed=n))
                for n, (p, limit) in enumerate(zip(asked, limits, strict=True))
            )
        )

    trajectories = []
    for n, (prompt, done) in enumerate(zip(asked, asyncio.run(everything()), strict=True)):
        mask = [False] * len(prompt) + [True] * len(done.token_ids)
        logps, zeros = [0.0] * len(prompt) + done.logps, [0.0] * len(mask)
        sequence = Sequence(prompt + done.token_ids, mask, logps, zeros, experts=done.experts)
        trajectories.append(Trajectory(n, n // SAMPLES, n % SAMPLES, [sequence]))
    return pack(trajectories)


def gap(policy: Policy, batch: TokenBatch, follows: bool) -> tuple[float, float]:
    """Return the mean gap in nats, and the share of routes that differ."""
    routing = RoutingSums(policy.routers, follows=follows) if len(policy.routers) else None
    everything = [[b] for b in range(batch.num_sequences)]
    stats = statistics(policy, batch, everything, StatsRequest(("logp",)), routing=routing)
    assert batch.engine_logp_T is not None
    gap_A = (stats.logp - batch.engine_logp_T)[batch.action_T].abs()
    if routing is None or routing.changed_L is None:
        return float(gap_A.mean()), 0.0
    return float(gap_A.mean()), float(routing.changed_L.mean()) / routing.tokens


def measure(experts: int) -> None:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(configuration(experts), dtype=torch.float32)
    with torch.no_grad():  # random weights of the usual size make nearly uniform predictions
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    with tempfile.TemporaryDirectory() as folder:
        lm.save_pretrained(Path(folder))
        policy = Policy.load(folder)
    assert not is_packed(policy.lm)
    for parameter in policy.lm.parameters():  # the rotary frequencies stay float32
        parameter.data = parameter.data.bfloat16()
    engine = EmbeddedEngine(
        policy.lm, decode=str, max_running_requests=64, memory_share=0.5, records_experts=experts > 0
    )
    batch = rollout(engine)
    own, changed = gap(policy, batch, follows=False)
    line = f"{experts:3d} experts: gap {own:.5f}" if experts else f"      dense: gap {own:.5f}"
    if experts:
        replayed, _ = gap(policy, batch, follows=True)
        line += f", with replay {replayed:.5f}, routes that differ {changed:.2%}"
    print(f"{line} ({int(batch.action_T.sum())} tokens)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for experts in (0, *options.experts):
        measure(experts)


if __name__ == "__main__":
    main()
