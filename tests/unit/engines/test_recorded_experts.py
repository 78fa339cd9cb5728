"""Experts that the embedded engine records: those of the model alone, for prompts, samples, and without a cache."""

from __future__ import annotations

import asyncio

import pytest
import torch
from sampling import generate, generate_across_weights
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.lockstep import Decoding, LockstepCache
from RL2.models.inspection import runs_packed
from RL2.models.loading import empty, materialise
from RL2.models.routing import RoutingRecord, find_routers
from RL2.types import Completion, Sampling

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 9, 10, 11], [40, 41, 42], [50, 51, 52, 53, 54, 55, 56], [60, 61]]


def packed(lm: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the model that calls packed attention, as in training."""
    made = empty(AutoModelForCausalLM, lm.config, torch.float32, True)
    materialise(made, made, torch.device("cpu"))
    made.load_state_dict(lm.state_dict())
    return made.eval()


def make_engine(lm: PreTrainedModel, records: bool = True) -> EmbeddedEngine:
    return EmbeddedEngine(lm, decode=str, max_running_requests=3, memory_share=0.5, records_experts=records)


def alone(lm: PreTrainedModel, ids: list[int]) -> Tensor:
    """Experts of all tokens but the last, from one forward without a cache."""
    record = RoutingRecord(find_routers(lm))
    with torch.no_grad(), record.recording():
        lm(input_ids=torch.tensor([ids[:-1]]), use_cache=False)
    return record.experts_NLK()


def check(lm: PreTrainedModel, completions: list[Completion]) -> None:
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.experts is not None
        assert completion.experts.dtype == torch.int16
        wanted = alone(lm, prompt + completion.token_ids)
        assert torch.equal(completion.experts.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "granitemoehybrid", "gpt_oss"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_they_are_those_of_the_model_alone(model_type: str, is_packed: bool) -> None:
    lm = tiny_model(tiny_config(model_type)).eval()
    if is_packed and runs_packed(lm):
        pytest.skip("it runs row by row")

    async def everything() -> list[Completion]:
        engine = make_engine(packed(lm) if is_packed else lm)
        limits = (12, 3, 20, 5, 9)  # requests leave at different times, and others enter
        asked = zip(PROMPTS, limits, strict=True)
        return await asyncio.gather(*(engine.generate(p, Sampling(n, seed=i)) for i, (p, n) in enumerate(asked)))

    check(lm, asyncio.run(everything()))


def test_accepted_drafts_have_theirs() -> None:
    """In the second epoch most drafts are right; the experts of wrong ones belong to no token."""
    lm = tiny_model(tiny_config("qwen3_moe")).eval()
    engine = EmbeddedEngine(
        packed(lm), decode=str, max_running_requests=3, memory_share=0.5, records_experts=True, speculation="always"
    )
    for least in (0, 60):
        check(lm, generate(engine, PROMPTS, Sampling(max_new_tokens=25)))
        metrics = engine.metrics()
        assert metrics["engine/drafted"] >= metrics["engine/accepted"] >= least


def test_a_forward_without_a_cache_records_new_tokens_alone() -> None:
    lm = tiny_model(tiny_config("mixtral")).eval()
    engine = make_engine(lm)
    engine.model.chosen = Decoding(engine.model.without_cache)
    check(lm, generate(engine, PROMPTS, Sampling(max_new_tokens=8)))


def test_a_long_prompt_in_pieces_records_all_of_its_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("RL2.engines.embedded.packed.PREFILL_TOKENS", 3)
    monkeypatch.setattr("RL2.engines.embedded.packed.pass_tokens", lambda device: 3)
    lm = tiny_model(tiny_config("qwen3_moe")).eval()
    check(lm, generate(make_engine(packed(lm)), PROMPTS, Sampling(max_new_tokens=8)))


@pytest.mark.parametrize("is_packed", [False, True])
def test_requests_that_start_over_keep_the_experts_of_their_samples(is_packed: bool) -> None:
    lm, old, new = (tiny_model(tiny_config("qwen3_moe")).eval() for _ in range(3))
    lm = packed(lm) if is_packed else lm
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    done, across = generate_across_weights(make_engine(lm), PROMPTS, new, 12, 9, sleeps=False), 0
    for prompt, completion in zip(PROMPTS, done, strict=True):
        assert completion.experts is not None
        assert len(completion.experts) == len(prompt) + len(completion.token_ids) - 1
        if number := completion.versions.count(0):  # sampled by the old weights
            kept, across = len(prompt) + number - 1, across + 1
            wanted = alone(old, prompt + completion.token_ids)[:kept]
            assert torch.equal(completion.experts[:kept].sort(-1).values, wanted.sort(-1).values)
    assert 0 < across < len(PROMPTS)


def test_nothing_is_recorded_unless_asked_for() -> None:
    lm = tiny_model(tiny_config("qwen3_moe")).eval()
    plain, recorded = (
        generate(make_engine(lm, wanted), PROMPTS, Sampling(max_new_tokens=8)) for wanted in (False, True)
    )
    assert all(completion.experts is None for completion in plain)
    assert [c.logps for c in plain] == [c.logps for c in recorded]


def test_prompts_of_a_cache_share_their_experts() -> None:
    lm = tiny_model(tiny_config("olmoe")).eval()
    cache = make_engine(lm).model.new_cache(1e9)
    assert isinstance(cache, LockstepCache)
    with torch.no_grad():
        cache.prefill({(5, 6, 7): [0, 2], (8, 9): [1]})
    assert {row: len(experts) for row, experts in cache.experts.items()} == {0: 3, 1: 2, 2: 3}
    assert torch.equal(cache.experts[0], cache.experts[2])
