"""What tests ask of the embedded engine, and what a completion has to agree with."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from RL2.engines.base import Engine
from RL2.ops.attention import PackedAttention
from RL2.types import Completion, Sampling


def generate(engine: Engine, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
    """All at once; request i has seed 100 + i."""

    async def everything() -> list[Completion]:
        return await asyncio.gather(
            *(engine.generate(p, replace(sampling, seed=100 + i)) for i, p in enumerate(prompts))
        )

    return asyncio.run(everything())


@torch.no_grad()
def logits_of(lm: PreTrainedModel, prompt: list[int], completion: Completion) -> Tensor:
    """The trainer's logits [n, V] before each sampled token."""
    device = next(lm.parameters()).device
    ids = torch.tensor(prompt + completion.token_ids, device=device)
    attend = PackedAttention(torch.tensor([0, len(ids)], device=device))
    positions = torch.arange(len(ids), device=device)
    hidden = lm.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False, attend=attend)
    return lm.lm_head(hidden.last_hidden_state[0, len(prompt) - 1 : -1]).float()
