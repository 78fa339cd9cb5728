"""OpenAI's chat completions, as its own client sends and reads them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from scripted_endpoint import ASK, RAW, Scripted, called, random_message, reply

from RL2.agents import openai_chat
from RL2.agents.conversation import continues, same
from RL2.agents.protocol import RequestError
from RL2.data.chat import Message

openai = pytest.importorskip("openai")

TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}
CALLS: Message = {
    "role": "assistant",
    "content": "Sum:",
    "reasoning_content": "Add them.",
    "tool_calls": [called({"a": 1, "b": [2]}), called({}, "call_2"), called('{"a": ', "call_3")],
}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "policy", "messages": [ASK], **more}


def test_the_client_reads_an_answer(server: Scripted, client: Any) -> None:
    server.replies = [reply(CALLS), reply({"content": "3"}, finish="length")]
    answer = client.chat.completions.create(**body(n=2, logprobs=True, tools=[TOOL]))
    first, second = answer.choices
    assert [first.index, second.index, first.finish_reason, second.finish_reason] == [0, 1, "tool_calls", "length"]
    assert first.message.content == "Sum:" and first.message.reasoning_content == "Add them."
    texts = ['{"a": 1, "b": [2]}', "{}", '{"a": ']
    assert [(call.id, call.function.arguments) for call in first.message.tool_calls] == [
        (f"call_{number}", text) for number, text in enumerate(texts, 1)
    ]
    assert second.message.content == "3" and second.message.tool_calls is None
    tokens = second.logprobs.content
    assert [(token.token, token.bytes, token.logprob, token.top_logprobs) for token in tokens] == [
        ("3", [51], 0, []),
        ("<end>", list(b"<end>"), -0.5, []),
    ]
    sampled = len(first.logprobs.content) + 2
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, sampled)
    assert answer.usage.total_tokens == 7 + sampled
    assert answer.model == "policy" and answer.object == "chat.completion"


def test_a_stream_is_the_answer_in_pieces(server: Scripted, client: Any) -> None:
    server.replies = [reply(CALLS), reply({"content": " 3\n"}), reply({"content": ""})]
    more = body(n=3, tools=[TOOL], logprobs=True)
    with client.chat.completions.stream(**more, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion()
    whole = client.chat.completions.create(**more)
    assert "content.done" in kinds and kinds.count("tool_calls.function.arguments.done") == 3
    for piece, choice in zip(streamed.choices, whole.choices, strict=True):
        told, known = (
            {key: value for key, value in each.message.model_dump().items() if value is not None}
            for each in (piece, choice)
        )
        for call in told.get("tool_calls", []):
            del call["index"], call["function"]["parsed_arguments"]
        assert told == known
        assert piece.finish_reason == choice.finish_reason
        assert piece.logprobs.content == choice.logprobs.content
    assert streamed.usage == whole.usage


def test_chunks_of_a_stream(server: Scripted, client: Any) -> None:
    server.replies = [reply({"content": "3", "reasoning_content": "Add.", "tool_calls": [called({"a": 1})]})]
    chunks = list(client.chat.completions.create(**body(stream=True)))
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    deltas = [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Add."},
        {"content": "3"},
        {"tool_calls": [{"index": 0, **called("")}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]},
        {},
    ]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 5 + ["tool_calls"]


RETURNS: tuple[Callable[[Any], Any], ...] = (
    lambda message: message,
    lambda message: message.model_dump(),
    lambda message: message.model_dump(exclude_none=True),
    lambda message: message.to_dict(),
    lambda message: {"role": "assistant", "content": message.content, "tool_calls": message.tool_calls},
    lambda message: {
        "role": "assistant",
        "content": [{"type": "text", "text": (message.content or "").strip()}],
        "tool_calls": [call.model_dump() for call in message.tool_calls or []],
    },
)
"""How agents put an answer into their history."""


def test_a_conversation_with_the_client_continues(server: Scripted, client: Any) -> None:
    random = Random(0)
    for number in range(10):
        history: list[Any] = [{"role": "system", "content": "Be brief."}, ASK]
        known: list[Message] = copy.deepcopy(history)
        for turn in range(3):
            message = random_message(random, turn)
            server.replies = [reply(message)]
            if number % 2:
                answer = client.chat.completions.create(**body(messages=history)).choices[0].message
            else:
                with client.chat.completions.stream(**body(messages=history)) as stream:
                    answer = stream.get_final_completion().choices[0].message
            read = server.requests[-1].messages
            assert len(read) == len(known) and continues(read, known), (number, turn, known)
            results = [
                {"role": "tool", "content": random_message(random, 0)["content"], "tool_call_id": call["id"]}
                for call in message.get("tool_calls", [])
            ]
            history += [random.choice(RETURNS)(answer), *(results or [ASK])]
            known += [message, *(results or [ASK])]


def test_an_answer_that_comes_back_is_read_as_its_message() -> None:
    random = Random(1)
    for number in range(300):
        message = random_message(random, number)
        answer = openai_chat.answer(openai_chat.read(body()), [reply(message)])
        returned = random.choice(RETURNS)(openai.types.chat.ChatCompletion.model_validate(answer).choices[0].message)
        returned = returned.model_dump() if not isinstance(returned, dict) else returned
        returned["tool_calls"] = [
            call if isinstance(call, dict) else call.model_dump() for call in returned.get("tool_calls") or []
        ]
        assert same(openai_chat.read(body(messages=[ASK, returned])).messages[1], message), message
        (_, read) = openai_chat.read(body(messages=[ASK, answer["choices"][0]["message"]])).messages
        assert read == message


@pytest.mark.parametrize("raw", RAW)
def test_arguments_that_are_no_object_stay_text(raw: str) -> None:
    message: Message = {"role": "assistant", "content": "", "tool_calls": [called(raw)]}
    choice = openai_chat.answer(openai_chat.read(body()), [reply(message)])["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == raw
    assert openai_chat.read(body(messages=[ASK, choice["message"]])).messages[1]["tool_calls"] == [called(raw)]


def test_the_parameters_of_a_request() -> None:
    request = openai_chat.read(
        body(
            n=3,
            max_tokens=5,
            temperature=0.5,
            top_p=0.9,
            seed=-4,
            stop="\n",
            stream=True,
            stream_options={"include_usage": True},
            parallel_tool_calls=False,
            logprobs=True,
            top_logprobs=0,
            reasoning_effort="low",
            chat_template_kwargs={"enable_thinking": False},
            tools=[
                TOOL | {"function": TOOL["function"] | {"strict": True}},
                {"type": "function", "function": {"name": "f"}},
            ],
            tool_choice="required",
            user="me",
            store=True,
            invented="x",
        )
    )
    assert (request.model, request.n, request.max_tokens, request.seed) == ("policy", 3, 5, -4)
    assert (request.temperature, request.top_p, request.stop) == (0.5, 0.9, ("\n",))
    assert request.stream and request.stream_usage and request.logprobs and not request.parallel_calls
    empty = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert request.arguments == {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "tools": [TOOL, {"type": "function", "function": empty}],
    }
    assert openai_chat.read(body(max_tokens=5, max_completion_tokens=6)).max_tokens == 6
    assert openai_chat.read(body(stop=["a", "b"])).stop == ("a", "b")


def test_null_is_the_same_as_left_out() -> None:
    keys = ("n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "tools", "logprobs")
    more = ("tool_choice", "response_format", "logit_bias", "functions", "parallel_tool_calls", "reasoning_effort")
    assert openai_chat.read(body(**dict.fromkeys(keys + more))) == openai_chat.read(body())


def test_no_tool_is_shown_if_none_may_be_called() -> None:
    assert "tools" not in openai_chat.read(body(tools=[TOOL], tool_choice="none")).arguments


def test_messages_are_those_of_chat_templates() -> None:
    parts = [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 2"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "ada"},
        {"role": "assistant", "content": None, "reasoning": "Add.", "refusal": None, "tool_calls": [called("{}")]},
        {"role": "tool", "content": None, "tool_call_id": "call_1", "name": None},
        {"role": "user", "content": ""},
    ]
    assert openai_chat.read(body(messages=messages)).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2", "name": "ada"},
        {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [called({})]},
        {"role": "tool", "content": "", "tool_call_id": "call_1"},
        {"role": "user", "content": ""},
    ]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages must be a list of at least one message"),
    ({"messages": "1 + 2"}, "messages must be a list, not '1 "),
    ({"messages": [7]}, r"messages\[0\] must be an object, not 7"),
    ({"messages": [{"role": "owner", "content": ""}]}, r"messages\[0\].role='owner' must be one of developer, "),
    ({"messages": [{"role": ["user"], "content": ""}]}, r"messages\[0\].role=\['user'\] must be one of"),
    ({"messages": [{"role": "user", "content": 7}]}, r"messages\[0\].content must be a list, not 7"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, r"messages\[0\].content\[0\] is of type 'image_url': the"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\].text must be a string, not None"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, r"messages\[0\].content has half of a surrogate pair"),
    ({"messages": [{"role": "assistant", "function_call": {}}]}, "calls are passed in tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "only functions are tools"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, r"tool_calls\[0\].function must be an object"),
    ({"messages": [{"role": "assistant", "tool_calls": [called([1])]}]}, "must have arguments as JSON text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 7}}]}]}, "must have the name of a tool"),
    ({"n": 0}, "n=0 must be an integer from 1 to 128"),
    ({"n": True}, "n=True must be an integer"),
    ({"n": 1e9}, "n=1000000000.0 must be an integer"),
    ({"max_tokens": 0}, "max_tokens=0 must be an integer from 1"),
    ({"temperature": float("nan")}, "temperature=nan must be a number from 0 to 2"),
    ({"temperature": "0.5"}, "temperature='0.5' must be a number"),
    ({"top_p": 0}, "top_p=0 must be a number"),
    ({"seed": 2**63}, "seed=9223372036854775808 must be"),
    ({"stream": "yes"}, "stream='yes' must be true or false"),
    ({"stream_options": 1}, "stream_options must be an object, not 1"),
    ({"stop": ["a", ""]}, "stop must not have an empty string"),
    ({"stop": [7]}, "stop must be a string, not 7"),
    ({"model": 7}, "model must be a string"),
    ({"top_logprobs": 3, "logprobs": True}, "top_logprobs=3 is not supported: the log-probability is kept of"),
    ({"functions": [{}]}, "functions=.* is not supported: functions are passed in tools; leave it out"),
    ({"response_format": {"type": "json_object"}}, "nothing constrains the sampling"),
    ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not supported: responses are sampled from the policy"),
    ({"logit_bias": {"7": 1}}, "logit_bias=.* is not supported"),
    ({"top_k": 20}, "top_k=20 is not supported"),
    ({"modalities": ["text", "audio"]}, "answers are text"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize is not supported"),
    ({"tools": [{"type": "custom"}]}, r"tools\[0\] is of type 'custom': only functions are tools"),
    ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\] must have a name, not None"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice=.* to one tool"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        openai_chat.read(body(**more))
    assert refused.value.status == 400 and refused.value.parameter


@pytest.mark.parametrize("more", [{"frequency_penalty": 0.0}, {"top_k": -1}, {"response_format": {"type": "text"}}])
def test_settings_without_effect_are_accepted(more: dict[str, Any]) -> None:
    assert openai_chat.read(body(**more)) == openai_chat.read(body())


def test_the_client_raises_the_error(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="n=0 must be an integer") as refused:
        client.chat.completions.create(**body(n=0))
    assert refused.value.param == "n" and refused.value.type == "invalid_request_error"
    assert openai_chat.error(RequestError("no room", 503))["error"]["type"] == "server_error"
