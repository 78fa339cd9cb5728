"""The embedded engine: what it samples, and that its log-probabilities are the trainer's."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sampling import generate, generate_across_weights, logits_of
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinPLogitsWarper,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from RL2.engines.embedded.compiled import refuse_no_compiler
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.sampling import sample, uniforms
from RL2.errors import ConfigError
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import Sampling

V = 64
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 200,
    "initializer_range": 0.3,
}
FAMILIES = [(Qwen3Config, Qwen3ForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)]
STOP = (1, 2, 3)


def make_model(config: Any = Qwen3Config, model: Any = Qwen3ForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    lm = model(config(**SHAPE)).eval()
    lm.set_attn_implementation(IMPLEMENTATION)
    return lm


def make_engine(lm: PreTrainedModel, rows: int = 4, compiles: bool = False) -> EmbeddedEngine:
    """Token i is written as the i-th letter from 'A' on."""
    return EmbeddedEngine(
        lm,
        decode=lambda ids: "".join(chr(65 + i) for i in ids),
        max_running_requests=rows,
        memory_share=0.5,
        compiles=compiles,
    )


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    return make_model()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, V, (n,), generator=g).tolist() for n in (3, 30, 1, 12, 7, 30, 55, 2, 9, 4, 17)]


@pytest.mark.parametrize(("config", "model"), FAMILIES, ids=lambda x: x.__name__)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_are_the_trainers(
    config: Any, model: Any, temperature: float, prompts: list[list[int]]
) -> None:
    lm = make_model(config, model)
    sampling = Sampling(max_new_tokens=40, temperature=temperature, stop_token_ids=STOP)
    for prompt, completion in zip(prompts, generate(make_engine(lm), prompts, sampling), strict=True):
        logp = (logits_of(lm, prompt, completion) / (temperature or 1.0)).log_softmax(-1)
        ours = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logps), ours, rtol=0, atol=1e-4)
        if temperature == 0:
            assert completion.token_ids == logp.argmax(-1).tolist()


def test_continuous_batching_changes_nothing(lm: PreTrainedModel, prompts: list[list[int]]) -> None:
    """Alone, four rows at a time, or all together: the same tokens, and every request ends as it should."""
    sampling = Sampling(max_new_tokens=25, stop_token_ids=STOP)
    together = generate(make_engine(lm, rows=64), prompts * 3, sampling)
    assert [c.token_ids for c in generate(make_engine(lm, rows=4), prompts * 3, sampling)] == [
        c.token_ids for c in together
    ]
    for i, (prompt, completion) in enumerate(zip(prompts * 3, together, strict=True)):
        alone = asyncio.run(make_engine(lm).generate(prompt, replace(sampling, seed=100 + i)))
        assert alone.token_ids == completion.token_ids
        assert (alone.token_ids[-1] in STOP) == (alone.finish == "stop")
        assert not set(alone.token_ids[:-1]) & set(STOP)
        assert alone.finish == "stop" or len(alone.token_ids) == 25
    assert {c.finish for c in together} == {"stop", "length"}


def test_requests_that_come_later_join_in(lm: PreTrainedModel, prompts: list[list[int]]) -> None:
    """A second turn is a request whose prompt holds the first answer."""
    engine, sampling = make_engine(lm), Sampling(max_new_tokens=10)

    async def two_turns(prompt: list[int], seed: int) -> list[int]:
        first = await engine.generate(prompt, replace(sampling, seed=seed))
        second = await engine.generate(prompt + first.token_ids + [5], replace(sampling, seed=seed + 1))
        return second.token_ids

    async def everything() -> list[list[int]]:
        return await asyncio.gather(*(two_turns(p, i) for i, p in enumerate(prompts)))

    assert asyncio.run(everything()) == [asyncio.run(two_turns(p, i)) for i, p in enumerate(prompts)]


def test_a_group_shares_its_prompt(lm: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(lm, rows=16)
    lengths: list[int] = []
    forward = engine.model.hidden
    monkeypatch.setattr(engine.model, "hidden", lambda ids, *rest: (lengths.append(len(ids)), forward(ids, *rest))[1])
    out = generate(engine, [[4, 5, 6, 7]] * 8 + [[8, 9]] * 8, Sampling(max_new_tokens=3))
    assert lengths == [6, 16, 16]
    assert len({tuple(c.token_ids) for c in out}) > 2


def test_stop_strings_end_with_the_token_that_completes_them(lm: PreTrainedModel, prompts: list[list[int]]) -> None:
    free = generate(make_engine(lm), prompts, Sampling(max_new_tokens=12))
    text = "".join(chr(65 + i) for i in free[0].token_ids)
    stopped = generate(make_engine(lm), prompts, Sampling(max_new_tokens=12, stop=("never", text[4:7])))
    assert stopped[0].token_ids == free[0].token_ids[: text.index(text[4:7]) + 3]
    assert stopped[0].finish == "stop"


def test_the_limit_of_the_model_ends_a_request(lm: PreTrainedModel) -> None:
    out = asyncio.run(make_engine(lm).generate([7] * 195, Sampling(max_new_tokens=50)))
    assert len(out.token_ids) == 5
    assert out.finish == "length"
    with pytest.raises(ValueError, match="a prompt of 200 tokens leaves no room: the model ends at 200"):
        asyncio.run(make_engine(lm).generate([7] * 200, Sampling(max_new_tokens=5)))
    with pytest.raises(ValueError, match="empty prompt"):
        asyncio.run(make_engine(lm).generate([], Sampling(max_new_tokens=5)))


def test_weights_are_taken_over_or_copied() -> None:
    lm, other = make_model(), make_model(LlamaConfig, LlamaForCausalLM)
    engine = make_engine(lm)
    pointers = [p.data_ptr() for p in lm.parameters()]
    engine.load_weights(((n, p.detach()) for n, p in lm.named_parameters()), version=3)
    assert [p.data_ptr() for p in lm.parameters()] == pointers
    before = asyncio.run(engine.generate([5, 6], Sampling(max_new_tokens=4)))
    assert before.versions == [3] * 4
    engine.load_weights(((n, p.detach() * 0.5) for n, p in lm.named_parameters()), version=4)
    after = asyncio.run(engine.generate([5, 6], Sampling(max_new_tokens=4)))
    assert after.versions == [4] * 4
    assert after.logps != before.logps
    with pytest.raises(RuntimeError, match="weights of version 5 lack"):
        engine.load_weights(((n, p) for n, p in other.named_parameters() if "norm" in n), version=5)


@pytest.mark.parametrize("sleeps", [False, True])
def test_requests_go_on_with_new_weights(sleeps: bool, prompts: list[list[int]]) -> None:
    """Each token has the log-probability of the weights that it names, computed from scratch."""
    lm, old, new = make_model(), make_model(), make_model()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=4, memory_share=0.5, owns_weights=True)
    engine.load_weights(iter(old.named_parameters()), version=1)

    completions = generate_across_weights(engine, prompts, new, limit=30, change_at=40, sleeps=sleeps)
    assert sum(len(set(c.versions)) == 2 for c in completions) == 4
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(completion.versions) == len(completion.token_ids)
        assert completion.versions == sorted(completion.versions)
        for version, weights in ((1, old), (2, new)):
            logp = logits_of(weights, prompt, completion).log_softmax(-1)
            theirs = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            mine = torch.tensor(completion.versions) == version
            torch.testing.assert_close(torch.tensor(completion.logps)[mine], theirs[mine], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_weights_may_come_from_another_thread(prompts: list[list[int]]) -> None:
    lm = make_model()
    engine = make_engine(lm)
    weights = [(name, parameter.detach().clone()) for name, parameter in lm.named_parameters()]
    expected = [c.token_ids for c in generate(make_engine(make_model()), prompts * 4, Sampling(max_new_tokens=60))]
    loads = 0

    def load() -> None:
        nonlocal loads
        while not engine.driver or not engine.driver.done():
            loads += 1
            engine.load_weights(iter(weights), version=loads)

    thread = threading.Thread(target=load)
    thread.start()
    completions = generate(engine, prompts * 4, Sampling(max_new_tokens=60))
    thread.join(30)
    assert not thread.is_alive()
    assert loads > 5
    assert len({version for c in completions for version in c.versions}) > 5
    assert [c.token_ids for c in completions] == expected


def test_sleep_leaves_the_memory_of_weights_that_are_its_own(prompts: list[list[int]]) -> None:
    sampling, trained = Sampling(max_new_tokens=5), make_model()
    weights = {name: weight.clone() for name, weight in trained.named_parameters()}
    for owns in (True, False):
        lm = make_model()
        engine = EmbeddedEngine(lm, decode=str, max_running_requests=4, memory_share=0.5, owns_weights=owns)
        before = [c.token_ids for c in generate(engine, prompts, sampling)]
        engine.sleep()
        engine.sleep()
        held = sum(parameter.numel() for parameter in lm.parameters())
        assert held == (0 if owns else sum(weight.numel() for weight in weights.values()))
        engine.load_weights(iter(weights.items()), version=1)
        assert [c.token_ids for c in generate(engine, prompts, sampling)] == before


def test_broken_weights_stop_every_request() -> None:
    lm = make_model()
    with torch.no_grad():
        lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the weights are broken"):
        generate(make_engine(lm), [[3], [4]], Sampling(max_new_tokens=4))


def test_memory_that_is_too_small_is_said(lm: PreTrainedModel) -> None:
    engine = EmbeddedEngine(lm, decode=str, max_running_requests=4, memory_share=1e-9)
    with pytest.raises(RuntimeError, match=r"raise rollout\.gpu_memory_utilization"):
        asyncio.run(engine.generate([3], Sampling(max_new_tokens=4)))


def draws(
    logits_V: Tensor, number: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`number` draws from one distribution: frequency of each token, and its log-probability (nan if never drawn)."""
    same = torch.ones(number)
    u = torch.from_numpy(uniforms(list(range(number)), [0] * number))
    settings = temperature * same, top_p * same, (top_k * same).long(), min_p * same
    ids, logps = sample(logits_V.expand(number, -1), *settings, u)
    frequency = torch.bincount(ids, minlength=len(logits_V)) / number
    logp = torch.full((len(logits_V),), float("nan")).index_copy(0, ids, logps)
    return frequency, logp


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    frequency, logp = draws(logits_V, 40_000, temperature)
    p = (logits_V / temperature).softmax(-1)
    assert (frequency - p).abs().max() < 4 * (p * (1 - p) / 40_000).sqrt().max()
    torch.testing.assert_close(logp[:4], p[:4].log())


@pytest.mark.parametrize("vocabulary", [7, 1024, 1500, 5003, 151_936])
def test_blocks_find_what_one_sum_finds(vocabulary: int) -> None:
    logits_RV = 3 * torch.randn(16, vocabulary, generator=torch.Generator().manual_seed(0))
    logits_RV[8:] -= 40 * torch.rand(8, vocabulary, generator=torch.Generator().manual_seed(1))  # few are likely
    uniform_R = torch.from_numpy(uniforms(list(range(16)), [0] * 16))
    uniform_R[0], uniform_R[1] = 0.0, 1 - 2.0**-53
    ones = torch.ones(16)
    ids, logps = sample(logits_RV, ones, ones, torch.zeros(16).long(), torch.zeros(16), uniform_R)
    logp_RV = logits_RV.log_softmax(-1)
    sums_RV = logp_RV.exp().double().cumsum(-1)
    right = torch.searchsorted(sums_RV, (uniform_R * sums_RV[:, -1])[:, None], right=True)[:, 0]
    assert ids.tolist()[2:] == right.tolist()[2:]
    assert ids[0] == 0
    torch.testing.assert_close(logps, logp_RV.gather(1, ids[:, None])[:, 0])
    assert logps[1] > -100  # the end of the sum, but never a token of probability 0


def test_top_k_top_p_and_min_p_cut_and_normalise() -> None:
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    cuts = (({"top_k": 2}, 2), ({"top_p": 0.6}, 2), ({"top_p": 0.5}, 1), ({"top_p": 0.8, "top_k": 2}, 2))
    # 0.15 / 0.5 is 0.3; without the last token 0.75 / 0.9 is more than 0.8
    for options, kept in (*cuts, ({"min_p": 0.29}, 3), ({"min_p": 0.31}, 2), ({"min_p": 0.25, "top_p": 0.8}, 2)):
        frequency, logp = draws(p.log(), 5_000, **options)  # type: ignore[arg-type]
        assert not frequency[kept:].any()
        torch.testing.assert_close(logp[:kept], (p[:kept] / p[:kept].sum()).log())


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.6, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("top_k", "min_p"), [(0, 0), (1, 0), (2, 0), (5, 0), (20, 0), (64, 0), (0, 0.05), (20, 0.2)])
def test_cuts_are_those_of_transformers(top_k: int, min_p: float, top_p: float) -> None:
    """Log-probabilities of all that can be drawn, at several temperatures, one distribution a row."""
    temperatures, same = torch.tensor([0.5, 1.0, 1.7, 1.0]), torch.ones(4)
    logits_RV = torch.tensor([[1.0], [2.0], [2.0], [4.0]]) * torch.randn(
        4, 64, generator=torch.Generator().manual_seed(0)
    )
    theirs_RV = logits_RV / temperatures[:, None]
    first = [MinPLogitsWarper(min_p)] if min_p else []
    for warper in (*first, *([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)):
        theirs_RV = warper(None, theirs_RV)
    for at in torch.linspace(0, 0.999, 40, dtype=torch.float64):
        settings = temperatures, top_p * same, (top_k * same).long(), min_p * same
        ids, logps = sample(logits_RV, *settings, at.expand(4).clone())
        torch.testing.assert_close(logps, theirs_RV.log_softmax(-1).gather(1, ids[:, None])[:, 0])


def test_rows_have_their_own_settings() -> None:
    logits_RV = torch.tensor([[0.0, 3.0, 1.0]]).repeat(3, 1)
    u = torch.tensor([0.999999, 0.999999, 0.0])
    temperature, top_k = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 0, 1])
    ids, logps = sample(logits_RV, temperature, torch.ones(3), top_k, torch.zeros(3), u)
    assert ids.tolist() == [2, 1, 1]
    assert logps[2] == 0
    torch.testing.assert_close(logps[1], logits_RV[1].log_softmax(-1)[1])


def test_uniforms_depend_on_seed_and_position_alone() -> None:
    u = uniforms([1, 2, 2**63 - 1], [0, 5, 7])
    assert (uniforms([2], [5]) == u[1]).all()
    many = uniforms(list(range(20_000)), [3] * 20_000)
    assert 0 <= many.min() < many.max() < 1
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(many, uniforms(list(range(20_000)), [4] * 20_000))[0, 1]) < 0.03


@pytest.mark.slow
def test_a_compiled_step_changes_nothing_and_is_compiled_once(prompts: list[list[int]]) -> None:
    """While rows come and leave, the cache grows and is made anew, and weights change."""
    lm = make_model()
    sampling = Sampling(max_new_tokens=90, stop_token_ids=STOP)
    plain, compiled = make_engine(lm, rows=64), make_engine(lm, rows=64, compiles=True)
    before = counters["stats"]["unique_graphs"]
    for few in (prompts, prompts[:3], prompts * 4):
        for ours, theirs in zip(generate(compiled, few, sampling), generate(plain, few, sampling), strict=True):
            assert ours.token_ids == theirs.token_ids
            torch.testing.assert_close(torch.tensor(ours.logps), torch.tensor(theirs.logps), rtol=0, atol=1e-5)
        with torch.no_grad():  # in place, as an optimizer does it
            for parameter in lm.parameters():
                parameter.mul_(1.01)
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.slow
def test_each_model_is_compiled_for_itself(prompts: list[list[int]]) -> None:
    """These have the same weights and shapes, and differ in numbers that stand in the program."""
    answers = []
    for eps, theta in ((1e-6, 1e4), (0.3, 10.0)):
        lm = make_model()
        for module in lm.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = eps
        lm.model.rotary_emb.inv_freq /= theta
        ours, theirs = (
            generate(make_engine(lm, compiles=compiles), prompts, Sampling(max_new_tokens=8))
            for compiles in (True, False)
        )
        assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
        answers.append([c.token_ids for c in ours])
    assert answers[0] != answers[1]


@pytest.mark.slow
def test_a_model_that_cannot_be_compiled_runs_as_it_is(
    prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    lm = make_model()

    class Branching(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() < 1e9 else -x

    lm.model.norm = torch.nn.Sequential(lm.model.norm, Branching())
    sampling = Sampling(max_new_tokens=5)
    ours, theirs = (generate(make_engine(lm, compiles=compiles), prompts, sampling) for compiles in (True, False))
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "this model cannot be compiled" in warning.message


def test_no_compiler_is_said_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    with pytest.raises(ConfigError, match="there is no a-compiler-that-is-not-there"):
        refuse_no_compiler()
