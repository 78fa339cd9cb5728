"""The embedded engine on a GPU: pages, recorded steps, bfloat16; its log-probabilities are the trainer's."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import torch
from sampling import generate, logits_of
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.paged import PagedCache
from RL2.ops import paged_attention
from RL2.ops.attention import IMPLEMENTATION
from RL2.ops.causal_attention import Scoring
from RL2.types import Completion, Sampling

SHAPE: dict[str, Any] = {
    "vocab_size": 5000,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 30_000,
    "initializer_range": 0.1,
}


def make_model(dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval().to("cuda")
    lm.set_attn_implementation(IMPLEMENTATION)
    for parameter in lm.parameters():  # the rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return lm


def make_engine(lm: PreTrainedModel, rows: int = 32) -> EmbeddedEngine:
    return EmbeddedEngine(lm, decode=str, max_running_requests=rows, memory_share=0.2)


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 5000, (n,), generator=g).tolist() for n in (3, 64, 130, 700, 1)]
    return [drawn[i] for i in (0, 1, 1, 1, 2, 3, 3, 3, 3, 4)] * 3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_log_probabilities_are_the_trainers(
    dtype: torch.dtype, tolerance: float, temperature: float, compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_model(dtype)
    engine = EmbeddedEngine(make_model(dtype), decode=str, max_running_requests=32, memory_share=0.2, compiles=compiled)
    graphs = []
    decode = engine._decode

    def look(cache: Any) -> None:
        decode(cache)
        graphs.append(sum(recorded is not None for recorded in cache.graphs.recorded.values()))

    engine._decode = look  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        completions = generate(engine, prompts(), Sampling(max_new_tokens=150, temperature=temperature))
    assert not caplog.records
    assert max(graphs) >= 1, "steps were not recorded"
    gaps = []
    for prompt, completion in zip(prompts(), completions, strict=True):
        assert len(completion.token_ids) == 150
        logp = (logits_of(lm, prompt, completion) / temperature).log_softmax(-1).cpu()
        ours = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        gaps.append((torch.tensor(completion.logps) - ours).abs())
    assert torch.cat(gaps).max() < tolerance
    assert torch.cat(gaps).mean() < tolerance / 10


def test_a_graph_computes_what_the_plain_step_does() -> None:
    lm = make_model(torch.bfloat16)
    recorded, plain = make_engine(lm), make_engine(lm)
    new_cache = plain._new_cache

    def without_graphs() -> PagedCache:
        cache = new_cache()
        assert isinstance(cache, PagedCache) and cache.graphs is not None
        cache.graphs.can_record = False
        return cache

    plain._new_cache = without_graphs  # type: ignore[method-assign]
    sampling = Sampling(max_new_tokens=100)
    for a, b in zip(generate(recorded, prompts(), sampling), generate(plain, prompts(), sampling), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logps == b.logps


def test_a_long_prompt_in_pieces_and_many_parts() -> None:
    """20,000 tokens: three passes, and forty parts in each step of decoding."""
    lm = make_model(torch.bfloat16)
    g = torch.Generator().manual_seed(3)
    prompt = torch.randint(0, 5000, (20_000,), generator=g).tolist()
    (completion, *_) = generate(make_engine(lm), [prompt, prompt], Sampling(max_new_tokens=40))
    logp = logits_of(lm, prompt, completion).log_softmax(-1).cpu()
    ours = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    gap = (torch.tensor(completion.logps) - ours).abs()
    assert gap.max() < 0.3
    assert gap.mean() < 0.03


def test_new_weights_come_during_requests() -> None:
    """Graphs hold addresses; here the weights move."""
    lm = make_model(torch.bfloat16)
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=16, memory_share=0.2, owns_weights=True)
    old = {name: weight.clone() for name, weight in lm.named_parameters()}
    new = {name: weight * 1.1 for name, weight in old.items()}

    async def everything() -> list[Completion]:
        tasks = [
            asyncio.create_task(engine.generate(p, Sampling(max_new_tokens=60, seed=i)))
            for i, p in enumerate(prompts()[:10])
        ]
        while sum(len(request.tokens) for request in engine.running) < 200:
            await asyncio.sleep(0)
        engine.sleep()
        engine.load_weights(iter(new.items()), version=2)
        return await asyncio.gather(*tasks)

    completions = asyncio.run(everything())
    for version, weights in ((0, old), (2, new)):
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                parameter.copy_(weights[name])
        for prompt, completion in zip(prompts(), completions, strict=False):
            logp = logits_of(lm, prompt, completion).log_softmax(-1).cpu()
            ours = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            mine = torch.tensor(completion.versions) == version
            assert mine.any()
            assert (torch.tensor(completion.logps) - ours)[mine].abs().mean() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_at_the_size_of_a_model(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    num_rows, heads, kv_heads, size, num_pages = 40, 16, 8, 128, 40 * 32 + 1
    keys, values = (torch.randn(num_pages * 64, kv_heads, size, device="cuda", dtype=dtype) for _ in range(2))
    query = torch.randn(num_rows, heads, size, device="cuda", dtype=dtype)
    table = (torch.randperm(num_pages - 1, device="cuda") + 1).view(num_rows, 32).int()
    position = torch.randint(0, 2048, (num_rows,), device="cuda")
    out = paged_attention.attend(query, keys, values, table, position, Scoring(size**-0.5))
    for row in range(num_rows):
        place = (table[row].long()[:, None] * 64 + torch.arange(64, device="cuda")).flatten()[: position[row] + 1]
        key, value = (x[place].double().repeat_interleave(2, dim=1) for x in (keys, values))
        shares = (torch.einsum("hd,shd->hs", query[row].double(), key) * size**-0.5).softmax(-1)
        right = torch.einsum("hs,shd->hd", shares, value)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out[row].double(), right, rtol=tolerance, atol=tolerance)
