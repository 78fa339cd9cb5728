"""Messages that clients send back are known again, and others are not."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from RL2.agents.calls import decoded
from RL2.agents.conversation import continues, same
from RL2.data.chat import Message


def call(arguments: Any, name: str = "add", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def turn(content: str | None = "Sum:", calls: list[dict[str, Any]] | None = None, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {}), **more}


CALL = call({"a": 1, "b": [2.5, {"c": None}]}, id="call_1")
KNOWN = turn(calls=[CALL], reasoning_content="Add them.")


def test_a_message_is_the_same_as_itself() -> None:
    assert same(copy.deepcopy(KNOWN), KNOWN)


@pytest.mark.parametrize(
    ("sent", "known"),
    [
        (turn(" Sum:\n", [CALL]), KNOWN),
        (turn("Sum:", [CALL], reasoning_content="\nAdd them. "), KNOWN),
        (turn("Sum:", [CALL], reasoning_content=""), KNOWN),
        (turn("Sum:", [CALL], refusal=None, annotations=[], audio=None, name=None), KNOWN),
        (turn("Sum:", [CALL], name="solver"), KNOWN),
        (turn("Sum:", [call({"b": [2.5, {"c": None}], "a": 1.0})]), KNOWN),
        (turn("Sum:", [call('{"a":1,"b":[2.5,{"c":null}]}')]), KNOWN),
        (turn(None), turn("")),
        (turn(None, tool_calls=None), turn("")),
        (turn(calls=[call("")]), turn(calls=[call({})])),
        (turn(calls=[call('{"a": ')]), turn(calls=[call(' {"a": ')])),
        (turn(calls=[call({"x": float("nan")})]), turn(calls=[call('{"x": NaN}')])),
        ({"role": "tool", "content": "3"}, {"role": "tool", "content": "3", "tool_call_id": "call_1"}),
    ],
)
def test_what_clients_change_does_not_matter(sent: Message, known: Message) -> None:
    assert same(sent, known)


@pytest.mark.parametrize(
    ("sent", "known"),
    [
        (turn("Sum", [CALL]), KNOWN),
        (turn("Sum:"), KNOWN),
        (turn("Sum:", [CALL, CALL]), KNOWN),
        (turn("Sum:", [CALL], reasoning_content="Subtract them."), KNOWN),
        (turn("Sum:", reasoning_content="Think."), turn("Sum:")),
        (turn("Sum:", [CALL | {"id": "call_2"}]), KNOWN),
        (turn("Sum:", [call(CALL["function"]["arguments"], name="subtract")]), KNOWN),
        (turn("Sum:", [call({"a": True, "b": [2.5, {"c": None}]})]), KNOWN),
        (turn("Sum:", [call({"a": "1", "b": [2.5, {"c": None}]})]), KNOWN),
        (turn("Sum:", [call({"a": 1, "b": [{"c": None}, 2.5]})]), KNOWN),
        ({"role": "user", "content": "Sum:"}, turn("Sum:")),
        ({"role": "user", "content": "a  b"}, {"role": "user", "content": "a b"}),
        ({"role": "user", "content": "Hi", "name": "a"}, {"role": "user", "content": "Hi", "name": "b"}),
        ({"role": "user", "content": "Hi", "name": "a"}, {"role": "user", "content": "Hi"}),
        (
            {"role": "tool", "content": "3", "tool_call_id": "call_2"},
            {"role": "tool", "content": "3", "tool_call_id": "call_1"},
        ),
    ],
)
def test_other_messages_are_told_apart(sent: Message, known: Message) -> None:
    assert not same(sent, known)


def test_messages_continue_what_they_begin_with() -> None:
    ask: Message = {"role": "user", "content": "1 + 2"}
    result: Message = {"role": "tool", "content": "3", "tool_call_id": "call_1"}
    known = [ask, KNOWN]
    assert continues([ask, turn("Sum: ", [CALL]), result], known)
    assert continues(known, known) and continues(known, [])
    assert not continues([ask], known)
    assert not continues([ask, turn("Other"), result], known)
    assert not continues([{"role": "system", "content": "Be brief."}, *known], known)


@pytest.mark.parametrize(
    "text", ['{"a": ', "[1]", "7", '"a"', "null", "{'a': 1}", "[" * 100_000, '{"a": ' + "1" * 5000]
)
def test_arguments_that_are_no_object_stay_text(text: str) -> None:
    assert decoded(text) == text
    assert same(turn(calls=[call(text)]), turn(calls=[call(text)]))


def test_nesting_too_deep_to_compare_is_not_the_same() -> None:
    def nested(depth: int) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for _ in range(depth):
            arguments = {"a": arguments}
        return arguments

    assert same(turn(calls=[call(nested(100))]), turn(calls=[call(nested(100))]))
    assert not same(turn(calls=[call(nested(5000))]), turn(calls=[call(nested(5000))]))
