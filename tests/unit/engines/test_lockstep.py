"""The embedded engine with a model's own forward: samples and log-probabilities are those of the model alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from sampling import alone, generate, generate_across_weights
from tiny_models import tiny_config, tiny_model
from transformers import PreTrainedModel

from RL2.engines.embedded.engine import EmbeddedEngine, OutOfMemory
from RL2.engines.embedded.lockstep import LockstepCache, OwnForward
from RL2.types import Completion, Sampling

WINDOW = {"sliding_window": 16}
"""Shorter than the tests' sequences."""
WINDOWS = ["cohere2", "gemma2", "gemma3_text", "mistral"]
MODELS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(WINDOWS, WINDOW),
    "gpt2": {},
    "lfm2": {},
    "mamba2": {"state_size": 16},
    "minimax": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
TOLERANCE = 1e-4
"""Nats, in float32."""


def make_model(name: str) -> PreTrainedModel:
    lm = tiny_model(tiny_config(name, MODELS[name]))
    with torch.no_grad():  # recurrences amplify rounding
        for parameter in lm.parameters():
            parameter.mul_(0.7)
    return lm


def make_engine(lm: PreTrainedModel, rows: int = 6, owns_weights: bool = False) -> EmbeddedEngine:
    return EmbeddedEngine(lm, decode=str, max_running_requests=rows, memory_share=0.5, owns_weights=owns_weights)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Messages that the engine logged, without those of transformers about missing kernels."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("RL2.")]


def prompts(*lengths: int) -> list[list[int]]:
    """Prompts of these lengths; equal lengths next to each other are the same prompt."""
    drawn: list[list[int]] = []
    for i, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(i)
        same = drawn and len(drawn[-1]) == length
        drawn.append(drawn[-1] if same else torch.randint(3, 320, (length,), generator=generator).tolist())
    return drawn


@pytest.mark.parametrize("name", WINDOWS)
def test_log_probabilities_are_those_of_the_model_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Requests leave at different times, and another enters. Types that always run so: test_lockstep_families.py."""
    lm = make_model(name)
    engine = make_engine(lm, rows=4)
    asked = prompts(23, 23, 12, 30, 30)

    async def everything() -> list[Completion]:
        limits = (64, 9, 20, 40, 5)
        return await asyncio.gather(
            *(
                engine.generate(prompt, Sampling(limit, seed=n))
                for n, (prompt, limit) in enumerate(zip(asked, limits, strict=True))
            )
        )

    for prompt, completion in zip(asked, asyncio.run(everything()), strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logps), alone(lm, prompt, completion), rtol=0, atol=TOLERANCE
        )
    assert not said(caplog)  # the cache was used


SOME = ["lfm2", "qwen3_moe"]
"""A hybrid and a mixture of experts."""


@pytest.mark.parametrize("name", SOME)
def test_a_seed_decides_and_nothing_else(name: str) -> None:
    lm, asked = make_model(name), prompts(3, 30, 1, 30, 7, 7, 7, 55)
    sampling = Sampling(max_new_tokens=12)
    together = generate(make_engine(lm, rows=64), asked * 2, sampling)
    assert [c.token_ids for c in generate(make_engine(lm, rows=3), asked * 2, sampling)] == [
        c.token_ids for c in together
    ]
    for i in (0, 5, 9, 15):
        one = asyncio.run(make_engine(lm).generate((asked * 2)[i], replace(sampling, seed=100 + i)))
        assert one.token_ids == together[i].token_ids
    assert len({tuple(c.token_ids) for c in together}) == 16


@pytest.mark.parametrize("sleeps", [False, True])
@pytest.mark.parametrize("name", SOME)
def test_requests_go_on_with_new_weights(name: str, sleeps: bool) -> None:
    """Each token has the log-probability of the weights that it names, computed from scratch."""
    lm, old, new = make_model(name), make_model(name), make_model(name)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    engine, asked = make_engine(lm, owns_weights=True), prompts(3, 30, 1, 30, 7, 7)
    engine.load_weights(iter(old.named_parameters()), version=1)

    completions = generate_across_weights(engine, asked, new, limit=20, change_at=30, sleeps=sleeps)
    for prompt, completion in zip(asked, completions, strict=True):
        versions_N, logps_N = torch.tensor(completion.versions), torch.tensor(completion.logps)
        assert completion.versions == sorted(completion.versions) and set(completion.versions) == {1, 2}
        for version, weights in ((1, old), (2, new)):
            is_its_N = versions_N == version
            expected_N = alone(weights, prompt, completion)[is_its_N]
            torch.testing.assert_close(logps_N[is_its_N], expected_N, rtol=0, atol=TOLERANCE)


def test_prompts_of_equal_length_run_once_each_and_all_requests_decode_together() -> None:
    lm = make_model("lfm2")
    engine = make_engine(lm, rows=16)
    generate(engine, [[3]], Sampling(max_new_tokens=1))  # the cache is checked
    shapes: list[tuple[int, ...]] = []
    lm.register_forward_pre_hook(
        lambda _, args, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    out = generate(engine, [[4, 5, 6, 7]] * 8 + [[8, 9, 10, 11]] * 4 + [[8, 9]] * 3, Sampling(max_new_tokens=2))
    assert shapes == [(2, 4), (1, 2), (15, 1)]
    assert len({tuple(c.token_ids) for c in out}) > 3


@pytest.mark.parametrize("name", ["lfm2", "gemma3_text", "minimax", "mamba2", "gpt2"])
@torch.no_grad()
def test_requests_of_different_lengths_join(name: str) -> None:
    lm = make_model(name)
    cache = OwnForward(lm).new_cache(1e9)
    first, longer, shorter = prompts(11, 40, 5)
    cache.prefill({tuple(first): [0, 1]})
    texts = [list(first), list(first)]
    for step in range(9):
        if step == 3:
            cache.prefill({tuple(longer): [2], tuple(shorter): [3]})
            texts += [list(longer), list(shorter)]
        if step == 6:  # the longest leaves, and row 3 takes its place
            cache.leave([2], [3], [2], 50)
            texts = [texts[0], texts[1], texts[3]]
        assert len(cache.groups) == 1
        assert cache.groups[0].length == max(map(len, texts))
        texts = [[*text, 5 + step + row] for row, text in enumerate(texts)]
        logits_RV = cache.decode([text[-1] for text in texts], [])
        wanted_RV = torch.cat([lm(input_ids=torch.tensor([text]), use_cache=False).logits[:, -1] for text in texts])
        torch.testing.assert_close(logits_RV.log_softmax(-1), wanted_RV.log_softmax(-1), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_requests_whose_caches_differ_decode_apart() -> None:
    lm = make_model("lfm2")
    cache = OwnForward(lm).new_cache(1e9)
    first, longer = prompts(11, 40)
    cache.prefill({tuple(first): [0]})
    cache.groups[0].cache.layers[0].only_here = 1
    cache.prefill({tuple(longer): [1]})
    assert len(cache.groups) == 2
    texts = [[*first, 5], [*longer, 6]]
    logits_RV = cache.decode([5, 6], [])
    wanted_RV = torch.cat([lm(input_ids=torch.tensor([text]), use_cache=False).logits[:, -1] for text in texts])
    torch.testing.assert_close(logits_RV.log_softmax(-1), wanted_RV.log_softmax(-1), rtol=0, atol=TOLERANCE)


def test_padding_that_changes_numbers_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    lm = make_model("qwen3_moe")

    def spoil(_: object, args: object, named: dict[str, Any], out: Any) -> None:
        if named.get("attention_mask") is not None:
            out.logits[:, :, 7] += 0.1

    lm.register_forward_hook(spoil, with_kwargs=True)
    engine = make_engine(lm, rows=16)
    generate(engine, [[3]], Sampling(max_new_tokens=1))  # the cache is checked
    (line,) = said(caplog)
    assert line.startswith("qwen3_moe samples slowly, in batches of equal length: padded, its own cache changes ")
    shapes: list[tuple[int, ...]] = []
    lm.register_forward_pre_hook(
        lambda _, args, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    asked = prompts(5, 5, 9)
    for prompt, completion in zip(asked, generate(engine, asked, Sampling(max_new_tokens=2)), strict=True):
        expected = alone(lm, prompt, completion)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=TOLERANCE)
    assert shapes[:4] == [(1, 5), (1, 9), (2, 1), (1, 1)]


def test_a_model_without_a_cache_recomputes(caplog: pytest.LogCaptureFixture) -> None:
    lm = tiny_model(tiny_config("recurrent_gemma"))
    asked = prompts(5, 5, 9)
    completions = generate(make_engine(lm), asked, Sampling(max_new_tokens=8))
    for prompt, completion in zip(asked, completions, strict=True):
        torch.testing.assert_close(
            torch.tensor(completion.logps), alone(lm, prompt, completion), rtol=0, atol=TOLERANCE
        )
    (line,) = said(caplog)
    assert line.startswith("recurrent_gemma samples slowly, with a forward over the whole sequence for each token: ")


@pytest.mark.parametrize("change", [0.1, float("nan")])
def test_a_cache_that_changes_numbers_is_not_used(change: float, caplog: pytest.LogCaptureFixture) -> None:
    lm = make_model("qwen3_moe")

    def spoil(_: object, args: object, named: dict[str, Any], out: Any) -> None:
        if named.get("past_key_values") is not None:
            out.logits[:, :, 7] += change

    lm.register_forward_hook(spoil, with_kwargs=True)
    asked = prompts(5, 5, 9)
    engine = make_engine(lm)
    for _ in range(2):
        completions = generate(engine, asked, Sampling(max_new_tokens=8))
        for prompt, completion in zip(asked, completions, strict=True):
            expected = alone(lm, prompt, completion)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=TOLERANCE)
    (line,) = said(caplog)  # once
    assert line.startswith("qwen3_moe samples slowly")
    assert "its own cache changes log-probabilities by" in line


def test_memory_is_counted_from_the_cache_itself() -> None:
    lm = make_model("gpt2")
    cache = OwnForward(lm).new_cache(1e9)
    config = lm.config
    assert isinstance(cache, LockstepCache)
    size = cache.decoding.row_size
    assert size.bytes_per_token == 2 * config.num_hidden_layers * config.hidden_size * 4
    assert size.fixed_bytes == 0
    assert cache.max_rows(100) == int(1e9 // (100 * size.bytes_per_token)) - 1
    states = OwnForward(make_model("mamba2")).new_cache(1e9).decoding.row_size
    assert states.bytes_per_token == 0 < states.fixed_bytes


def test_memory_that_is_too_small_is_said() -> None:
    engine = EmbeddedEngine(make_model("lfm2"), decode=str, max_running_requests=4, memory_share=1e-9)
    with pytest.raises(OutOfMemory, match=r"raise rollout\.gpu_memory_utilization"):
        asyncio.run(engine.generate([3], Sampling(max_new_tokens=4)))


def test_broken_weights_stop_every_request(caplog: pytest.LogCaptureFixture) -> None:
    lm = make_model("qwen3_moe")
    with torch.no_grad():
        lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the weights are broken"):
        generate(make_engine(lm), [[3], [4]], Sampling(max_new_tokens=4))
    assert not said(caplog)
