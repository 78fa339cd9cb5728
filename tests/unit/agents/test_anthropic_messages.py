"""Anthropic's messages, as its own client sends and reads them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from scripted_endpoint import ASK, MESSAGE, RAW, Scripted, called, random_message, reply

from RL2.agents import anthropic_messages
from RL2.agents.conversation import continues, same
from RL2.agents.protocol import RequestError
from RL2.data.chat import Message

anthropic = pytest.importorskip("anthropic")

TOOL = {"name": "add", "description": "Add.", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture
def client(server: Scripted) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0) as client:
        yield client


def body(**more: Any) -> dict[str, Any]:
    return {"model": "policy", "max_tokens": 9, "messages": [ASK], **more}


def test_the_client_reads_an_answer(server: Scripted, client: Any) -> None:
    server.replies = [reply(MESSAGE)]
    answer = client.messages.create(**body(tools=[TOOL]))
    thought, text, first, second = answer.content
    assert (thought.type, thought.thinking) == ("thinking", "Add them.")
    assert (text.type, text.text) == ("text", "Sum:")
    assert (first.id, first.name, first.input) == ("call_1", "add", {"a": 1})
    assert second.input == {"INVALID_JSON": '{"a": '}
    assert (answer.stop_reason, answer.stop_sequence, answer.model) == ("tool_use", None, "policy")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, len(server.replies[0].token_ids))


@pytest.mark.parametrize(
    ("more", "reason"),
    [({}, "end_turn"), ({"finish": "length"}, "max_tokens"), ({"stop": "\n"}, "stop_sequence")],
)
def test_the_reason_of_the_end(more: dict[str, Any], reason: str, server: Scripted, client: Any) -> None:
    server.replies = [reply({"content": "3"}, **more)]
    answer = client.messages.create(**body(stop_sequences=["\n"]))
    assert (answer.stop_reason, answer.stop_sequence) == (reason, more.get("stop"))
    with client.messages.stream(**body(stop_sequences=["\n"])) as stream:
        answer = stream.get_final_message()
    assert (answer.stop_reason, answer.stop_sequence) == (reason, more.get("stop"))


def test_a_stream_is_the_answer_in_pieces(server: Scripted, client: Any) -> None:
    for message in (MESSAGE, {"content": " 3\n"}, {"content": ""}):
        server.replies = [reply(message)]
        with client.messages.stream(**body(tools=[TOOL])) as stream:
            streamed = stream.get_final_message()
        whole = client.messages.create(**body(tools=[TOOL]))
        assert [block.to_dict() for block in streamed.content] == [block.to_dict() for block in whole.content]
        assert streamed.usage.to_dict() == whole.usage.to_dict()


def test_the_events_of_a_stream_come_in_order(server: Scripted, client: Any) -> None:
    server.replies = [reply(MESSAGE | {"tool_calls": [called({})]})]
    events = list(client.messages.create(**body(stream=True)))
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [event.type for event in events] == [
        "message_start",
        *[block[0], block[1], *block[1:]],
        *block,
        *block,
        "message_delta",
        "message_stop",
    ]
    assert [event.index for event in events if event.type == "content_block_start"] == [0, 1, 2]


RETURNS: tuple[Callable[[Any], Any], ...] = (
    lambda answer: answer.content,
    lambda answer: [block.model_dump() for block in answer.content],
    lambda answer: [block.to_dict() for block in answer.content if block.type != "thinking"],
    lambda answer: [
        {"type": "text", "text": block.text.strip()} if block.type == "text" else block.to_dict()
        for block in answer.content
    ],
)
"""How agents put an answer into their history."""


def test_a_conversation_with_the_client_continues(server: Scripted, client: Any) -> None:
    random = Random(0)
    for number in range(8):
        history: list[Any] = [copy.deepcopy(ASK)]
        known: list[Message] = [{"role": "system", "content": "Be brief."}, ASK]
        for turn in range(3):
            message = random_message(random, turn)
            server.replies = [reply(message)]
            more = body(system="Be brief.", messages=history)
            if number % 2:
                answer = client.messages.create(**more)
            else:
                with client.messages.stream(**more) as stream:
                    answer = stream.get_final_message()
            read = server.requests[-1].messages
            assert len(read) == len(known) and continues(read, known), (number, turn, known)
            calls = message.get("tool_calls", [])
            results = [{"type": "tool_result", "tool_use_id": call["id"], "content": "3"} for call in calls]
            history.append({"role": "assistant", "content": random.choice(RETURNS)(answer)})
            history.append({"role": "user", "content": [*results, {"type": "text", "text": "Go on."}]})
            known += [message, *({"role": "tool", "content": "3", "tool_call_id": call["id"]} for call in calls)]
            known.append({"role": "user", "content": "Go on."})


def test_an_answer_that_comes_back_is_read_as_its_message() -> None:
    random = Random(1)
    for number in range(300):
        message = random_message(random, number)
        answer = anthropic_messages.answer(anthropic_messages.read(body()), [reply(message)])
        json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
        returned = random.choice(RETURNS)(anthropic.types.Message.model_validate(answer))
        blocks = [block if isinstance(block, dict) else block.model_dump() for block in returned]
        for content, equal in ((blocks, False), (answer["content"], True)):
            history = [ASK, {"role": "assistant", "content": content}, ASK]
            read = anthropic_messages.read(body(messages=history)).messages[1]
            assert same(read, message), message
            assert not equal or read == message


@pytest.mark.parametrize(
    "arguments", [*RAW, {"INVALID_JSON": "x"}, {"INVALID_JSON": 1}, {"a": float("-inf")}, {"a": "\udc00"}, ""]
)
def test_arguments_that_are_no_json_object_keep_their_form(arguments: Any) -> None:
    message: Message = {"role": "assistant", "content": "", "tool_calls": [called(arguments)]}
    answer = anthropic_messages.answer(anthropic_messages.read(body()), [reply(message)])
    assert isinstance(answer["content"][0]["input"], dict)
    history = [ASK, {"role": "assistant", "content": answer["content"]}, ASK]
    assert anthropic_messages.read(body(messages=history)).messages[1]["tool_calls"] == [called(arguments or {})]


def test_messages_are_those_of_chat_templates() -> None:
    text = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, text]},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, text]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": [text], "is_error": True},
                {"type": "tool_result", "tool_use_id": "call_2"},
                text,
            ],
        },
        {"role": "system", "content": "c"},
        {"role": "user", "content": []},
    ]
    assert anthropic_messages.read(body(messages=messages, system=[text, text])).messages == [
        {"role": "system", "content": "b\nb"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": "b", "tool_call_id": "call_1"},
        {"role": "tool", "content": "", "tool_call_id": "call_2"},
        {"role": "user", "content": "b"},
        {"role": "system", "content": "c"},
        {"role": "user", "content": ""},
    ]


@pytest.mark.parametrize("as_blocks", [True, False])
def test_a_line_for_the_bill_is_no_part_of_the_prompt(as_blocks: bool) -> None:
    texts = ["x-anthropic-billing-header: cc_version=2.1; cch=eb6c6;", "Be brief.\nx-anthropic-billing-header: kept"]
    system = [{"type": "text", "text": text} for text in texts] if as_blocks else "\n".join(texts)
    assert anthropic_messages.read(body(system=system)).messages == [{"role": "system", "content": texts[1]}, ASK]
    assert anthropic_messages.read(body(system=texts[0])).messages == [ASK]


def test_the_parameters_of_a_request() -> None:
    request = anthropic_messages.read(
        body(
            tools=[TOOL, {"type": "custom", "name": "f", "input_schema": {}}],
            tool_choice={"type": "any", "disable_parallel_tool_use": True},
            stop_sequences=["a", "b"],
            temperature=1,
            top_p=0.5,
            thinking={"type": "enabled", "budget_tokens": 1024},
            output_config={"effort": "low"},
            chat_template_kwargs={"enable_thinking": True},
            metadata={"user_id": "me"},
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            stream=True,
        )
    )
    add = {"name": "add", "description": "Add.", "parameters": TOOL["input_schema"]}
    assert request.arguments["tools"] == [
        {"type": "function", "function": add},
        {"type": "function", "function": add | {"name": "f", "description": ""}},
    ]
    assert (request.arguments["enable_thinking"], request.arguments["reasoning_effort"]) == (True, "low")
    assert (request.max_tokens, request.stop, request.temperature, request.top_p) == (9, ("a", "b"), 1, 0.5)
    assert request.stream and not request.parallel_calls
    assert "tools" not in anthropic_messages.read(body(tools=[TOOL], tool_choice={"type": "none"})).arguments


def test_a_prompt_can_be_counted_without_a_limit() -> None:
    request = anthropic_messages.read_count({"messages": [ASK], "tools": [TOOL]})
    assert request.messages == [ASK] and request.arguments["tools"] and request.max_tokens is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_tokens": None}, "max_tokens must be given"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": [{"role": "tool", "content": ""}]}, r"messages\[0\].role='tool' must be user or assistant"),
        ({"messages": [ASK, {"role": "assistant", "content": "3"}]}, "messages end with the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, r"content\[0\] is of type 'image': the end"),
        ({"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, r"is of type \['text'\]"),
        ({"messages": [{"role": "user", "content": [7]}]}, r"messages\[0\].content\[0\] must be an object, not 7"),
        ({"tools": [{"type": "web_search_20260209", "name": "web_search"}]}, r"tools\[0\] is of type 'web_search_202"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "add"}}, "tool_choice=.* to one tool"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice must be an object, not 'auto'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "format=.* nothing constrains the sampling"),
        ({"top_k": 5}, "top_k=5 is not supported"),
        ({"container": "x"}, "container='x' is not supported"),
    ],
)
def test_what_has_no_counterpart_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        anthropic_messages.read(body(**more))


def test_the_client_raises_the_error(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="top_k=5 is not supported") as refused:
        client.messages.create(**body(), extra_body={"top_k": 5})
    assert refused.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, "authentication_error"), (413, "request_too_large"), (422, "invalid_request_error"), (500, "api_error")],
)
def test_errors_have_the_type_of_their_status(status: int, kind: str) -> None:
    error = anthropic_messages.error(RequestError("no", status))
    assert error == {"type": "error", "error": {"type": kind, "message": "no"}}
