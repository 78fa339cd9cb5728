"""OpenAI's completions of a text or of token ids, as its own client sends and reads them."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_endpoint import TEXTS, Scripted, reply

from RL2.agents import openai_completions
from RL2.agents.protocol import RequestError

openai = pytest.importorskip("openai")


def test_the_client_reads_an_answer(server: Scripted, client: Any) -> None:
    server.replies = [reply({"content": " 3 = x"}), reply({"content": ""}, finish="length")]
    answer = client.completions.create(model="policy", prompt="1 + 2 =", n=2, logprobs=0)
    first, second = answer.choices
    assert (first.index, first.text, first.finish_reason) == (0, " 3 = x", "stop")
    assert (second.index, second.text, second.finish_reason) == (1, "", "length")
    assert first.logprobs.tokens == [" 3 ", "= x", "<end>"] and first.logprobs.text_offset == [0, 3, 6]
    assert first.logprobs.token_logprobs == [0, -0.5, -1]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 4, 11)
    assert server.requests[-1].prompt == "1 + 2 =" and server.requests[-1].messages == []


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_is_the_answer_in_pieces(text: str, server: Scripted, client: Any) -> None:
    server.replies = [reply({"content": text}), reply({"content": "b"}, finish="length")]
    more: dict[str, Any] = {"model": "policy", "prompt": [1, 2], "n": 2, "stream": True}
    chunks = list(client.completions.create(**more, stream_options={"include_usage": True}))
    assert server.requests[-1].prompt == [1, 2]
    assert chunks[-1].usage.completion_tokens == len(server.replies[0].token_ids) + 2
    for number, (expected, finish) in enumerate(((text, "stop"), ("b", "length"))):
        pieces = [choice for chunk in chunks for choice in chunk.choices if choice.index == number]
        assert "".join(piece.text for piece in pieces) == expected
        assert pieces[-1].finish_reason == finish


@pytest.mark.parametrize(
    ("prompt", "read"), [("a", "a"), (["a"], "a"), ([1, 0], [1, 0]), ([[1, 0]], [1, 0]), (["é\n"], "é\n")]
)
def test_prompts_are_a_text_or_token_ids(prompt: Any, read: Any) -> None:
    assert openai_completions.read({"prompt": prompt}).prompt == read


@pytest.mark.parametrize(("logprobs", "wanted"), [(None, False), (False, False), (0, True)])
def test_logprobs_of_the_sampled_token_only(logprobs: Any, wanted: bool) -> None:
    assert openai_completions.read({"prompt": "a", "logprobs": logprobs}).logprobs is wanted


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": ["a", "b"]}, "prompt is a list of 2 prompts: send one request for each"),
        ({"prompt": [[1], [2]]}, "prompt is a list of 2 prompts"),
        ({"prompt": None}, "prompt must be a text or a list of token ids, not None"),
        ({"prompt": ""}, "prompt must be a text"),
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": [[]]}, "prompt must be a text"),
        ({"prompt": [-1]}, "prompt must be a text"),
        ({"prompt": [True]}, "prompt must be a text"),
        ({"prompt": "\udc00"}, "prompt has half of a surrogate pair"),
        ({"logprobs": 5}, "logprobs=5 is not supported: the log-probability is kept of the sampled token only"),
        ({"logprobs": True}, "logprobs=True is not supported"),
        ({"echo": True}, "echo=True is not supported"),
        ({"suffix": "}"}, "suffix='}' is not supported"),
        ({"n": 2, "best_of": 3}, "best_of=3 is not supported: all n responses are returned"),
    ],
)
def test_what_has_no_counterpart_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        openai_completions.read({"prompt": "a", **more})
