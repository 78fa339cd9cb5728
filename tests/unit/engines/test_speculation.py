"""Drafts change no sample: the engine with them against the same engine without, whatever is drafted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from sampling import generate, generate_across_weights, logits_of
from tiny_models import tiny_config, tiny_model
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.history import Trail
from RL2.engines.embedded.speculation import Mode, Speculation
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import Completion, Sampling

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 200,
    "initializer_range": 0.3,
}
WINDOW = 16


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    lm.set_attn_implementation(IMPLEMENTATION)
    return lm


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    return make_model()


def make_engine(lm: PreTrainedModel, mode: Mode = "always", rows: int = 6, compiles: bool = False) -> EmbeddedEngine:
    return EmbeddedEngine(
        lm,
        decode=lambda ids: "".join(chr(65 + i) for i in ids),
        max_running_requests=rows,
        memory_share=0.2,
        compiles=compiles,
        speculation=mode,
    )


def prompts() -> list[list[int]]:
    """Groups of 1 to 4."""
    g = torch.Generator().manual_seed(1)
    drawn = [torch.randint(4, 60, (n,), generator=g).tolist() for n in (3, 30, 1, 12)]
    return [prompt for number, prompt in enumerate(drawn, 1) for _ in range(number)]


def alike(ours: list[Completion], theirs: list[Completion]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.token_ids, a.finish, a.versions) == (b.token_ids, b.finish, b.versions)
        # a low temperature multiplies rounding
        torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), rtol=1e-4, atol=1e-4)


SAMPLINGS = {
    "free": Sampling(40),
    "greedy": Sampling(40, temperature=0.0, stop_token_ids=(1, 2, 3)),
    "cold": Sampling(40, temperature=0.3, stop_token_ids=(1, 2, 3)),
    "top_p": Sampling(40, temperature=0.5, top_p=0.9),
    "top_k": Sampling(40, temperature=0.7, top_k=3, top_p=0.8),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_samples_are_those_without_drafts(lm: PreTrainedModel, name: str) -> None:
    """In a first epoch most drafts are wrong; in a second one with the same seeds, all are right."""
    engine, sampling = make_engine(lm), SAMPLINGS[name]
    right = generate(make_engine(lm, "off"), prompts(), sampling)
    tokens = sum(len(completion.token_ids) for completion in right)
    for least in (0.0, 0.7):
        alike(generate(engine, prompts(), sampling), right)
        metrics = engine.metrics()
        assert metrics["engine/accepted"] <= metrics["engine/drafted"]
        assert metrics["engine/accepted"] >= least * tokens
        # the first token of a response comes with its prompt
        assert metrics["engine/accepted_share"] == metrics["engine/accepted"] / (tokens - len(right))
    assert engine.metrics() == {}


def test_a_response_ends_within_an_accepted_draft(lm: PreTrainedModel) -> None:
    """At a stop string, at a stop token, at its own limit and at that of the model."""
    engine = make_engine(lm)
    free = generate(engine, prompts(), Sampling(40))
    text = "".join(chr(65 + i) for i in free[0].token_ids)
    cases = [
        Sampling(40, stop=("never", text[14:17])),
        Sampling(40, stop_token_ids=(free[0].token_ids[21],)),
        Sampling(23),
    ]
    for sampling in cases:
        drafted = generate(engine, prompts(), sampling)
        alike(drafted, generate(make_engine(lm, "off"), prompts(), sampling))
        assert len(drafted[0].token_ids) < 40
        assert engine.metrics()["engine/accepted"] > 10
    at_the_end = [[7] * 195] * 3
    alike(generate(engine, at_the_end, Sampling(50)), generate(make_engine(lm, "off"), at_the_end, Sampling(50)))


@pytest.mark.parametrize("name", ["gemma2", "mistral", "granite_swa"])
def test_wrong_drafts_overwrite_nothing_that_a_window_sees(name: str) -> None:
    """Soft caps, a window in every layer, and sinks."""
    lm = tiny_model(tiny_config(name))
    lm.set_attn_implementation(IMPLEMENTATION)
    asked = [[5, 6, 7]] * 3 + [list(range(10, 10 + WINDOW + 4))]
    off, engine = make_engine(lm, "off"), make_engine(lm)
    for temperature in (1.0, 0.3):
        sampling = Sampling(45, temperature=temperature)
        right = generate(off, asked, sampling)
        for _ in range(2):
            alike(generate(engine, asked, sampling), right)
        # the history now drafts the answers to these seeds for others
        alike(
            [asyncio.run(engine.generate(asked[0], replace(sampling, seed=9)))],
            [asyncio.run(off.generate(asked[0], replace(sampling, seed=9)))],
        )
        metrics = engine.metrics()
        assert 0 < metrics["engine/accepted"] < metrics["engine/drafted"]


def test_each_token_names_the_weights_that_sampled_it() -> None:
    lm, old, new = make_model(), make_model(), make_model()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    engine = EmbeddedEngine(
        lm, decode=str, max_running_requests=4, memory_share=0.2, owns_weights=True, speculation="always"
    )
    engine.load_weights(iter(old.named_parameters()), version=1)
    for seeds_seen in range(2):
        completions = generate_across_weights(engine, prompts(), new, limit=30, change_at=40, sleeps=True)
        for prompt, completion in zip(prompts(), completions, strict=True):
            assert len(completion.versions) == len(completion.token_ids) == 30
            assert completion.versions == sorted(completion.versions)
            for version, weights in ((1, old), (2, new)):
                logp = logits_of(weights, prompt, completion).log_softmax(-1)
                theirs = logp.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                mine = torch.tensor(completion.versions) == version
                torch.testing.assert_close(torch.tensor(completion.logps)[mine], theirs[mine], rtol=0, atol=1e-4)
        if not seeds_seen:
            engine.load_weights(iter(old.named_parameters()), version=1)
    assert engine.metrics()["engine/accepted"] > 0


def test_drafts_come_from_siblings_epochs_and_turns(lm: PreTrainedModel) -> None:
    """Each case is one of these alone, in a history of its own."""
    sampling, prompt = Sampling(40, seed=5), [9, 8, 7, 6, 5, 4]
    answer = asyncio.run(make_engine(lm, "off").generate(prompt, sampling)).token_ids

    def share(engine: EmbeddedEngine, *ids: list[int], sampling: Sampling = sampling) -> float:
        for each in ids:
            asyncio.run(engine.generate(each, sampling))
            metrics = engine.metrics()
        return metrics["engine/accepted_share"]

    assert share(make_engine(lm), prompt) < 0.1
    assert share(make_engine(lm), prompt, prompt) > 0.9  # an earlier epoch
    greedy = Sampling(40, temperature=0.0)
    first = asyncio.run(make_engine(lm, "off").generate(prompt, greedy)).token_ids
    later = [*prompt, *first, 3]
    repeats = asyncio.run(make_engine(lm, "off").generate(later, greedy)).token_ids
    if len(set(repeats)) < 20:  # the model repeats itself
        assert share(make_engine(lm), later, sampling=greedy) > 0.3

    engine = make_engine(lm, rows=2)  # a sibling that runs, ahead by 15 tokens

    async def siblings() -> list[int]:
        ahead = asyncio.create_task(engine.generate(prompt, sampling))
        while not engine.running or len(engine.running[0].tokens) < 15:
            await asyncio.sleep(0)
        done = await engine.generate(prompt, sampling)
        await ahead
        return done.token_ids

    assert asyncio.run(siblings()) == answer
    assert engine.metrics()["engine/accepted"] > 12


def test_models_that_run_their_own_forward_are_not_drafted_for() -> None:
    """A recurrent state cannot go back to where a draft went wrong."""
    engine = make_engine(tiny_model(tiny_config("lfm2")))
    generate(engine, [[5, 6, 7]] * 2, Sampling(4))
    assert engine.speculation is None
    assert engine.metrics() == {}


class Repeating:
    """A request whose response repeats a sentence."""

    def __init__(self) -> None:
        self.prompt, self.tokens, self.limit = [1, 2, 3], [4], 100_000
        self.trail: Trail | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


@pytest.mark.parametrize(
    ("each_s", "fixed_s", "pays"), [(0.0, 0.0, True), (0.1, 0.2, True), (1.0, 0.0, False), (0.0, 20.0, False)]
)
def test_drafts_are_kept_while_they_pay(each_s: float, fixed_s: float, pays: bool) -> None:
    """Every token is guessed; a pass takes 1 s, one with drafts `fixed_s` more and `each_s` for each guess of a row."""
    rows, now = 8, 0.0
    speculation = Speculation("auto", lambda: now)
    requests = [Repeating() for _ in range(rows)]
    verified = 0
    for step in range(250):
        drafts = speculation.drafts(requests)
        guesses = drafts.tokens() if drafts else [[] for _ in requests]
        counts = []
        for request, guess in zip(requests, guesses, strict=True):
            start = len(request.tokens)
            for i in range(len(guess) + 1):
                token = 10 + (start + i) % 12
                request.tokens.append(token)
                if guess[i : i + 1] != [token]:
                    break
            counts.append(len(request.tokens) - start)
        number = sum(map(len, guesses))
        seconds = 1 + (fixed_s + each_s * number / rows if number else 0)
        now += seconds
        speculation.learn(requests, drafts, counts, seconds)
        verified += step >= 100 and number > 0
    assert verified > 130 if pays else verified < 10
