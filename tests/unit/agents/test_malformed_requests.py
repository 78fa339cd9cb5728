"""A request of any form is read or refused with a reason; no other error leaves a protocol."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from scripted_endpoint import called

from RL2.agents import anthropic_messages, openai_chat, openai_completions, openai_responses
from RL2.agents.protocol import Protocol, RequestError

SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}}
SETTINGS = {
    "model": "policy",
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "stream": False,
    "chat_template_kwargs": {"enable_thinking": True},
}
PARTS = [{"type": "text", "text": "1 + 2"}]

CHAT = {
    **SETTINGS,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": PARTS, "name": "ada"},
        {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [called('{"a": 1}')]},
        {"role": "tool", "content": "3", "tool_call_id": "call_1"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": SCHEMA}}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "stop": ["\n"],
    "n": 2,
    "max_tokens": 5,
    "logprobs": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
}
COMPLETIONS = {**SETTINGS, "prompt": [1, 2], "n": 2, "max_tokens": 5, "logprobs": 0, "stop": "\n"}
RESPONSES = {
    **SETTINGS,
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "1 + 2"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Add."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Sum:"}]},
        {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "3"},
    ],
    "tools": [{"type": "function", "name": "add", "parameters": SCHEMA, "strict": True}],
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "text"}},
    "include": ["message.output_text.logprobs"],
    "max_output_tokens": 5,
}
MESSAGES = {
    **SETTINGS,
    "system": PARTS,
    "messages": [
        {"role": "user", "content": PARTS},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Add.", "signature": ""},
                {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": PARTS}]},
    ],
    "tools": [{"name": "add", "description": "Add.", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    "stop_sequences": ["\n"],
    "max_tokens": 5,
    "output_config": {"effort": "low"},
}

ODD = (None, True, 0, -1, 2**70, 1.5, float("nan"), "", "x", "\ud800", "[[[", [], [[]], [None], {}, {"type": "text"})
"""Values that take the place of any other."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container of a JSON value, with a key or position in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def refusal(protocol: Protocol, body: dict[str, Any]) -> RequestError | None:
    try:
        protocol.read(body)
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("protocol", "body"),
    [
        (openai_chat, CHAT),
        (openai_completions, COMPLETIONS),
        (openai_responses, RESPONSES),
        (anthropic_messages, MESSAGES),
    ],
)
def test_a_malformed_request_is_read_or_refused(protocol: Protocol, body: dict[str, Any]) -> None:
    assert refusal(protocol, body) is None
    refused = 0
    for number in range(len(list(places(body)))):
        for odd in ODD:
            changed = copy.deepcopy(body)
            container, key = list(places(changed))[number]
            container[key] = odd
            if error := refusal(protocol, changed):
                assert error.status == 400 and error.parameter
                assert protocol.error(error)["error"]["message"] == str(error) != ""
                refused += 1
    assert refused > len(ODD)


def test_keys_may_be_missing_anywhere() -> None:
    random = Random(0)
    for protocol, body in ((openai_chat, CHAT), (openai_responses, RESPONSES), (anthropic_messages, MESSAGES)):
        for _ in range(300):
            changed = copy.deepcopy(body)
            for _ in range(random.randrange(1, 4)):
                container, key = random.choice(list(places(changed)))
                del container[key]
            error = refusal(protocol, changed)
            assert error is None or error.parameter
