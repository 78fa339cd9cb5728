"""What every engine has to do: the embedded one, SGLang's with a stand-in, real vLLM servers (`make test-engine`)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from served import ENGINES, MAX_LENGTH, Served, logits_of, logps_of, save_model, save_own_forward, serve
from transformers import PreTrainedTokenizerBase

from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling

PROMPTS = [[5 + (7 * i + n) % 250 for n in range(length)] for i, length in enumerate((3, 30, 1, 140, 7, 30, 300))]


@pytest.fixture(scope="module", params=ENGINES)
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    processes: Processes,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    name, _, model_type = request.param.partition("-")
    if name == "embedded" and model_type:
        model = save_own_forward(folder / "model", tokenizer, model_type)
        served = serve(name, model, folder, tokenizer, processes)
    else:
        model = save_model(folder / "model", tokenizer, tied=True)
        served = serve(request.param, model, folder, tokenizer, processes)
    served.sync()
    yield served
    served.engine.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.7, "top_p": 0.9}],
    ids=str,
)
def test_log_probabilities_are_those_of_the_distribution_drawn_from(served: Served, options: dict[str, Any]) -> None:
    sampling = Sampling(max_new_tokens=24, **options)
    if served.name == "sglang" and "top_p" in options:
        with pytest.raises(ValueError, match="only with top_k=1 to 4096"):
            served.generate(PROMPTS, sampling)
        return
    lm = served.reference()
    for prompt, completion in zip(PROMPTS, served.generate(PROMPTS, sampling), strict=True):
        expected = logps_of(lm, prompt, completion.token_ids, sampling)
        torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=1e-4)
        assert completion.finish == "length" and len(completion.token_ids) == 24
        assert completion.versions == [served.version] * len(completion.token_ids)
        if sampling.temperature == 0:
            assert completion.token_ids == logits_of(lm, prompt, completion.token_ids).argmax(-1).tolist()


def test_a_seed_decides_and_nothing_else(served: Served) -> None:
    """64 requests together are the same as each alone; another seed gives other tokens."""
    sampling = Sampling(max_new_tokens=16)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(64)]
    together = served.generate(prompts, sampling)
    assert len({tuple(completion.token_ids) for completion in together}) == 64
    for i in (0, 17, 40, 63):
        alone = asyncio.run(served.engine.generate(prompts[i], replace(sampling, seed=100 + i)))
        assert alone.token_ids == together[i].token_ids
        assert alone.logps == pytest.approx(together[i].logps, abs=1e-4)


def test_long_prompts_that_come_together_change_nothing(served: Served) -> None:
    """They are more than one forward pass takes, so a prompt is read in pieces."""
    prompts = [[5 + (11 * i + 7 * n) % 250 for n in range(400)] for i in range(40)]
    together = served.generate(prompts, Sampling(max_new_tokens=4))
    for i in (0, 6, 13, 20, 39):
        alone = asyncio.run(served.engine.generate(prompts[i], Sampling(max_new_tokens=4, seed=100 + i)))
        assert alone.token_ids == together[i].token_ids


def test_end_tokens_end_a_response_and_are_kept(served: Served) -> None:
    ends = tuple(range(0, 320, 20))  # the model's own end token is not among them
    assert served.tokenizer.eos_token_id not in ends
    prompts = PROMPTS * 4
    free = served.generate(prompts, Sampling(max_new_tokens=24))
    stopped = served.generate(prompts, Sampling(max_new_tokens=24, stop_token_ids=ends))
    for whole, cut in zip(free, stopped, strict=True):
        first = next((i for i, token in enumerate(whole.token_ids) if token in ends), None)
        assert cut.token_ids == whole.token_ids[: None if first is None else first + 1]
        assert cut.finish == ("length" if first is None else "stop")
    assert {completion.finish for completion in stopped} == {"stop", "length"}


def test_an_end_token_that_is_not_asked_for_ends_nothing(served: Served) -> None:
    """The run says what ends a response; the model's generation configuration does not."""
    end = served.tokenizer.eos_token_id
    with_end = [c for c in served.generate(PROMPTS * 40, Sampling(max_new_tokens=40)) if end in c.token_ids[:-1]]
    assert with_end and all(completion.finish == "length" for completion in with_end)


def test_a_stop_string_ends_with_the_token_that_completes_it(served: Served) -> None:
    def text(token_ids: list[int]) -> str:
        return str(served.tokenizer.decode(token_ids))

    prompt, sampling = PROMPTS[1], Sampling(max_new_tokens=24, seed=3)
    free = asyncio.run(served.engine.generate(prompt, sampling)).token_ids
    # two tokens of plain characters, so that the string lies across them
    i = next(i for i in range(4, 22) if (text(free[i : i + 2])).isascii() and len(text(free[i : i + 2]).strip()) > 1)
    stop = text(free[i : i + 2])
    end = next(n for n in range(1, 25) if stop in text(free[:n]))
    stopped = asyncio.run(served.engine.generate(prompt, replace(sampling, stop=("never seen", stop))))
    assert stopped.token_ids == free[:end]
    assert len(stopped.logps) == end and stopped.finish == "stop"


def test_the_length_limit_ends_a_response(served: Served) -> None:
    prompt = [7] * (MAX_LENGTH - 5)
    completion = asyncio.run(served.engine.generate(prompt, Sampling(max_new_tokens=50)))
    assert (len(completion.token_ids), completion.finish) == (5, "length")


def test_a_prompt_that_cannot_be_gone_on_from_is_refused(served: Served) -> None:
    with pytest.raises(ValueError, match=f"a prompt of {MAX_LENGTH} tokens leaves no room"):
        asyncio.run(served.engine.generate([7] * MAX_LENGTH, Sampling(max_new_tokens=5)))
    with pytest.raises(ValueError, match="an empty prompt"):
        asyncio.run(served.engine.generate([], Sampling(max_new_tokens=5)))


def test_a_request_that_is_given_up_takes_no_room(served: Served) -> None:
    async def give_up() -> list[list[int]]:
        tasks = [
            asyncio.create_task(served.engine.generate(PROMPTS[1], Sampling(max_new_tokens=400, seed=i)))
            for i in range(70)
        ]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        assert all(isinstance(x, asyncio.CancelledError) for x in await asyncio.gather(*tasks, return_exceptions=True))
        return [(await served.engine.generate(PROMPTS[1], Sampling(max_new_tokens=4, seed=1))).token_ids]

    alone = asyncio.run(served.engine.generate(PROMPTS[1], Sampling(max_new_tokens=4, seed=1)))
    assert asyncio.run(give_up()) == [alone.token_ids]


def test_new_weights_are_served_from_then_on(served: Served) -> None:
    """Whatever was cached of the old ones: the longest prompts fill whole blocks of the servers' caches."""
    sampling = Sampling(max_new_tokens=8)
    for seed in (1, 2):
        served.generate(PROMPTS, sampling)
        served.change_weights(seed)
        served.sync()
        lm = served.reference()
        for prompt, completion in zip(PROMPTS, served.generate(PROMPTS, sampling), strict=True):
            expected = logps_of(lm, prompt, completion.token_ids, sampling)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=1e-4)
            assert completion.versions == [served.version] * len(completion.token_ids)


def test_weights_that_come_during_requests_serve_the_rest_of_them(served: Served) -> None:
    """Each token knows its version, and its log-probability is that of its version; a sleep before changes nothing."""
    sampling = Sampling(max_new_tokens=200)
    lms = {served.version: served.reference()}

    async def generate() -> list[Completion]:
        requests = [
            asyncio.create_task(served.engine.generate(PROMPTS[i % 7], replace(sampling, seed=i))) for i in range(28)
        ]
        for seed, sleeps in ((1, False), (2, True)):
            # one that comes after them has been answered: they are under way, however slow the machine is
            await served.engine.generate(PROMPTS[0], Sampling(max_new_tokens=8))
            if sleeps:
                await asyncio.to_thread(served.engine.sleep)
            served.change_weights(seed)
            await asyncio.to_thread(served.sync)
            lms[served.version] = served.reference()
        return await asyncio.gather(*requests)

    completions = asyncio.run(generate())
    assert {version for completion in completions for version in completion.versions} == set(lms)
    for i, completion in enumerate(completions):
        assert (len(completion.token_ids), completion.finish) == (200, "length")
        versions_N = torch.tensor(completion.versions)
        for version, lm in lms.items():
            is_its_N = versions_N == version
            expected_N = logps_of(lm, PROMPTS[i % 7], completion.token_ids, sampling)
            ours_N = torch.tensor(completion.logps)
            torch.testing.assert_close(ours_N[is_its_N], expected_N[is_its_N], rtol=0, atol=1e-4)


def test_after_sleep_the_next_weights_wake_it(served: Served) -> None:
    before = served.generate(PROMPTS, Sampling(max_new_tokens=8))
    served.engine.sleep()
    served.sync()
    after = served.generate(PROMPTS, Sampling(max_new_tokens=8))
    assert [completion.token_ids for completion in after] == [completion.token_ids for completion in before]


def test_metrics_are_numbers_and_start_anew(served: Served) -> None:
    served.generate(PROMPTS, Sampling(max_new_tokens=8))
    metrics = served.engine.metrics()
    assert all(isinstance(value, float) and name.startswith("engine/") for name, value in metrics.items())
