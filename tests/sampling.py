"""What tests ask of the embedded engine, and what a completion has to agree with."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from RL2.engines.base import Engine
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.ops.attention import PackedAttention
from RL2.types import Completion, Sampling


def generate(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
    """All at once; request i has seed 100 + i."""

    async def everything() -> list[Completion]:
        return await asyncio.gather(
            *(engine.generate(p, replace(sampling, seed=100 + i)) for i, p in enumerate(prompts))
        )

    return asyncio.run(everything())


def generate_across_weights(
    engine: EmbeddedEngine, prompts: list[list[int]], new: PreTrainedModel, limit: int, change_at: int, sleeps: bool
) -> list[Completion]:
    """At most `limit` tokens for each prompt, all at once; request i has seed i.

    When `change_at` tokens are there, the engine gets the weights of `new` as version 2, with `sleeps` after a sleep.
    """

    async def everything() -> list[Completion]:
        tasks = [
            asyncio.create_task(engine.generate(p, Sampling(max_new_tokens=limit, seed=i)))
            for i, p in enumerate(prompts)
        ]
        while sum(len(request.tokens) for request in engine.running) < change_at:
            await asyncio.sleep(0)
        if sleeps:
            engine.sleep()
            await asyncio.sleep(0.02)
            assert not any(parameter.numel() for parameter in engine.lm.parameters())
        engine.load_weights(iter(new.named_parameters()), version=2)
        return await asyncio.gather(*tasks)

    return asyncio.run(everything())


@torch.no_grad()
def alone(lm: PreTrainedModel, prompt: list[int], completion: Completion) -> Tensor:
    """The log-probabilities of a completion, from one forward over it all without a cache."""
    ids = torch.tensor([prompt + completion.token_ids])
    logp_NV = lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp_NV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]


@torch.no_grad()
def logits_of(lm: PreTrainedModel, prompt: list[int], completion: Completion) -> Tensor:
    """The trainer's logits [n, V] before each sampled token."""
    device = next(lm.parameters()).device
    ids = torch.tensor(prompt + completion.token_ids, device=device)
    attend = PackedAttention(torch.tensor([0, len(ids)], device=device))
    positions = torch.arange(len(ids), device=device)
    hidden = lm.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False, attend=attend)
    return lm.lm_head(hidden.last_hidden_state[0, len(prompt) - 1 : -1]).float()
