"""Comparison of the conversation that a client sends with the one that is known: what was sent and sampled before.

A client returns an answer in its own words: it strips texts, drops the reasoning and writes arguments anew. Such
messages are still the known ones, so that the sampled token ids go on without a new encoding.
"""

from __future__ import annotations

import json
from typing import Any

from RL2.agents.calls import decoded
from RL2.data.chat import Message

WRITTEN = ("content", "name")
"""Keys of messages that the client has written itself, so that they come back as they were."""


def continues(messages: list[Message], known: list[Message]) -> bool:
    """Return whether `messages` begin with `known`."""
    return len(messages) >= len(known) and all(map(same, messages, known))


def same(sent: Message, known: Message) -> bool:
    """Return whether a client that sends `sent` means the message `known`.

    Whitespace around the assistant's texts, keys that are null and keys that no template reads are ignored. The
    reasoning and the ids of calls are compared only if `sent` has them.
    """
    if sent.get("role") != known.get("role") or _text(sent, "content") != _text(known, "content"):
        return False
    if sent.get("role") != "assistant" and any((sent.get(key) or "") != (known.get(key) or "") for key in WRITTEN):
        return False
    reasoning, call_id = _text(sent, "reasoning_content"), sent.get("tool_call_id")
    if reasoning and reasoning != _text(known, "reasoning_content"):
        return False
    if call_id and call_id != known.get("tool_call_id"):
        return False
    calls, known_calls = sent.get("tool_calls") or [], known.get("tool_calls") or []
    return len(calls) == len(known_calls) and all(map(_same_call, calls, known_calls))


def _text(message: Message, key: str) -> str:
    return (message.get(key) or "").strip()


def _same_call(sent: dict[str, Any], known: dict[str, Any]) -> bool:
    if sent.get("id") and sent["id"] != known.get("id"):
        return False
    function, known_function = sent["function"], known["function"]
    if function["name"] != known_function["name"]:
        return False
    arguments = _canonical(function["arguments"])
    return arguments is not None and arguments == _canonical(known_function["arguments"])


def _canonical(arguments: dict[str, Any] | str) -> str | None:
    """Return the same text for arguments that mean the same, such as 1 and 1.0; not for 1 and true.

    Return None for arguments that Python cannot write, which are the same as no others.
    """
    if isinstance(arguments, str):
        arguments = decoded(arguments)
    if isinstance(arguments, str):
        return arguments.strip()
    try:
        return json.dumps(json.loads(json.dumps(arguments), parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):  # not writable by Python
        return None


def _number(text: str) -> float:
    """Return an integer where the number is one: JavaScript writes 1.0 as 1."""
    number = float(text)
    return int(number) if number.is_integer() else number
