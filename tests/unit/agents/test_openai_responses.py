"""OpenAI's responses, as its own client sends and reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from scripted_endpoint import ASK, MESSAGE, Scripted, called, random_message, reply

from RL2.agents import openai_responses
from RL2.agents.conversation import continues, same
from RL2.agents.protocol import RequestError
from RL2.data.chat import Message

openai = pytest.importorskip("openai")

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": True}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "policy", "input": [ASK], **more}


def test_the_client_reads_an_answer(server: Scripted, client: Any) -> None:
    server.replies = [reply(MESSAGE)]
    answer = client.responses.create(**body(tools=[TOOL], include=["message.output_text.logprobs"]))
    thought, text, first, second = answer.output
    assert thought.type == "reasoning" and thought.content[0].text == "Add them."
    assert answer.output_text == "Sum:" == text.content[0].text
    assert [token.logprob for token in text.content[0].logprobs] == server.replies[0].logps
    assert (first.call_id, first.name, first.arguments) == ("call_1", "add", '{"a": 1}')
    assert (second.call_id, second.arguments) == ("call_2", '{"a": ')
    assert answer.status == "completed" and answer.error is None and answer.tools[0].name == "add"
    sampled = len(server.replies[0].token_ids)
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, sampled, 7 + sampled)


def test_every_object_is_complete() -> None:
    request = openai_responses.read(body(tools=[TOOL]))
    openai.types.responses.Response.model_validate(openai_responses.answer(request, [reply(MESSAGE)]))
    known = {
        "response.created": openai.types.responses.ResponseCreatedEvent,
        "response.in_progress": openai.types.responses.ResponseInProgressEvent,
        "response.output_item.added": openai.types.responses.ResponseOutputItemAddedEvent,
        "response.content_part.added": openai.types.responses.ResponseContentPartAddedEvent,
        "response.reasoning_text.delta": openai.types.responses.ResponseReasoningTextDeltaEvent,
        "response.reasoning_text.done": openai.types.responses.ResponseReasoningTextDoneEvent,
        "response.output_text.delta": openai.types.responses.ResponseTextDeltaEvent,
        "response.output_text.done": openai.types.responses.ResponseTextDoneEvent,
        "response.content_part.done": openai.types.responses.ResponseContentPartDoneEvent,
        "response.function_call_arguments.delta": openai.types.responses.ResponseFunctionCallArgumentsDeltaEvent,
        "response.function_call_arguments.done": openai.types.responses.ResponseFunctionCallArgumentsDoneEvent,
        "response.output_item.done": openai.types.responses.ResponseOutputItemDoneEvent,
        "response.completed": openai.types.responses.ResponseCompletedEvent,
    }
    events = list(openai_responses.events(request, [reply(MESSAGE)]))
    for number, (name, data) in enumerate(events):
        assert name is not None and isinstance(data, dict) and data["sequence_number"] == number
        known[name].model_validate(data)
    assert {name for name, _ in events} == known.keys()


def test_the_events_of_a_stream_come_in_order(server: Scripted, client: Any) -> None:
    server.replies = [reply({"content": "3", "tool_calls": [called({})]})]
    kinds = [event.type.removeprefix("response.") for event in client.responses.create(**body(stream=True))]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_a_response_cut_by_the_limit_is_incomplete(server: Scripted, client: Any) -> None:
    server.replies = [reply({"content": "1 + "}, finish="length")]
    answer = client.responses.create(**body(max_output_tokens=3))
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    last = list(client.responses.create(**body(stream=True)))[-1]
    assert last.type == "response.incomplete" and last.response.output_text == "1 + "


RETURNS: tuple[Callable[[Any], list[Any]], ...] = (
    lambda answer: answer.output,
    lambda answer: [item.model_dump(exclude_unset=True) for item in answer.output],
    lambda answer: [item.to_dict() for item in answer.output if item.type != "reasoning"],
    lambda answer: [
        {"role": "assistant", "content": item.content[0].text} if item.type == "message" else item.model_dump()
        for item in answer.output
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
            more = {"model": "policy", "instructions": "Be brief.", "input": history}
            if number % 2:
                answer = client.responses.create(**more)
            else:
                with client.responses.stream(**more) as stream:
                    answer = stream.get_final_response()
            read = server.requests[-1].messages
            assert len(read) == len(known) and continues(read, known), (number, turn, known)
            calls = message.get("tool_calls", [])
            results = [{"type": "function_call_output", "output": "3", "call_id": call["id"]} for call in calls]
            history += [*random.choice(RETURNS)(answer), *(results or [ASK])]
            known += [message, *({"role": "tool", "content": "3", "tool_call_id": call["id"]} for call in calls)]
            known += [] if calls else [ASK]


def test_an_answer_that_comes_back_is_read_as_its_message() -> None:
    random = Random(1)
    for number in range(300):
        message = random_message(random, number)
        answer = openai_responses.answer(openai_responses.read(body()), [reply(message)])
        returned = random.choice(RETURNS)(openai.types.responses.Response.model_validate(answer))
        returned = [item if isinstance(item, dict) else item.model_dump() for item in returned]
        (_, read) = openai_responses.read(body(input=[ASK, *returned])).messages
        assert same(read, message), message
        (_, read) = openai_responses.read(body(input=[ASK, *answer["output"]])).messages
        assert read == message


def test_answers_in_a_row_stay_apart() -> None:
    call = {"type": "function_call", "name": "add", "arguments": "{}"}
    items = [
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
        {**call, "call_id": "a"},
        {**call, "call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "function_call_output", "call_id": "b", "output": "4"},
        {**call, "call_id": "c"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Think."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Three."}]},
        {"role": "developer", "content": "End."},
    ]
    assert openai_responses.read(body(input=items)).messages == [
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two.", "tool_calls": [called({}, "a"), called({}, "b")]},
        {"role": "tool", "content": "3", "tool_call_id": "a"},
        {"role": "tool", "content": "4", "tool_call_id": "b"},
        {"role": "assistant", "content": "", "tool_calls": [called({}, "c")]},
        {"role": "assistant", "content": "Three.", "reasoning_content": "Think."},
        {"role": "system", "content": "End."},
    ]


def test_the_parameters_of_a_request() -> None:
    request = openai_responses.read(
        body(
            input="1 + 2",
            instructions="Be brief.",
            tools=[TOOL],
            tool_choice="auto",
            max_output_tokens=5,
            temperature=0,
            parallel_tool_calls=False,
            reasoning={"effort": "low", "summary": "auto"},
            chat_template_kwargs={"enable_thinking": False},
            text={"format": {"type": "text"}, "verbosity": "low"},
            include=["reasoning.encrypted_content"],
            store=True,
            truncation="auto",
            metadata={"a": "b"},
        )
    )
    function = {"name": "add", "description": "", "parameters": TOOL["parameters"]}
    assert request.messages == [{"role": "system", "content": "Be brief."}, ASK]
    assert request.arguments == {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "tools": [{"type": "function", "function": function}],
    }
    assert (request.max_tokens, request.temperature, request.parallel_calls) == (5, 0, False)
    assert not request.logprobs and not request.stream


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input": None}, "input must be a text or a list of at least one item"),
        ({"input": [{"role": "owner", "content": ""}]}, r"input\[0\].role='owner' must be one of"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "of type 'input_image': the endpoint"),
        (
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "'item_reference' is not supported: the endpoint keeps",
        ),
        ({"input": [{"type": "web_search_call"}]}, r"input\[0\] of type 'web_search_call' is not supported"),
        ({"input": [{"type": ["message"]}]}, r"input\[0\] of type \['message'\] is not supported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id='resp_1' is not supported: the endpoint keeps no"),
        ({"conversation": "conv_1"}, "send the whole conversation in input"),
        ({"background": True}, "background=True is not supported"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format=.* nothing constrains the sampling"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] is of type 'web_search': only functions are tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "add"}}, "tool_choice=.* to one tool"),
        ({"max_output_tokens": 0}, "max_output_tokens=0 must be an integer from 1"),
    ],
)
def test_what_has_no_counterpart_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        openai_responses.read(body(**more))
