"""Every type of model that runs its own forward: how it decodes, and that its samples are those of the model alone."""

from __future__ import annotations

import asyncio

import pytest
import torch
from model_tables import listed
from sampling import alone
from tiny_models import VARIANTS, tiny_config, tiny_model

from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.lockstep import OwnForward
from RL2.types import Completion, Sampling

pytestmark = pytest.mark.slow

SLOW = {"kimi_linear"}
"""Types whose reference code takes seconds for a prompt."""
WITHOUT_CACHE = {"openai-gpt", "recurrent_gemma", "rwkv", "xlstm"}
"""Types without a cache, or whose cache is not exact."""
REQUESTS = ((23, 64), (23, 9), (12, 20), (30, 12), (41, 5), (7, 14))
"""Tokens of each prompt and of its completion, four at a time: requests leave, and longer and shorter ones enter."""


@pytest.mark.parametrize("name", sorted(set(listed("**Exact, row by row through their own forward**")) - SLOW))
def test_requests_of_all_lengths_decode_together(name: str) -> None:
    lm = tiny_model(tiny_config(*VARIANTS.get(name, (name,)))).eval()
    with torch.no_grad():  # steep models amplify rounding
        for parameter in lm.parameters():
            parameter.mul_(0.7)
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=4, memory_share=0.5)
    assert isinstance(engine.model, OwnForward)
    prompts = [[7 * (i + n) % 320 for i in range(length)] for n, (length, _) in enumerate(REQUESTS)]

    async def everything() -> list[Completion]:
        samplings = [Sampling(limit, seed=n) for n, (_, limit) in enumerate(REQUESTS)]
        return await asyncio.gather(*map(engine.generate, prompts, samplings))

    if name in WITHOUT_CACHE:
        engine.model.new_cache(1e9)
        assert engine.model.chosen is not None and engine.model.chosen.forward == engine.model.without_cache
        return
    for prompt, completion in zip(prompts, asyncio.run(everything()), strict=True):
        expected = alone(lm, prompt, completion)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=1e-4)
    assert engine.model.chosen is not None and engine.model.chosen.is_ragged
