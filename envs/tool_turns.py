"""Turns with tool calls: each call is answered by a message, within limits; shared by environments."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .gsm8k import number as number_on
from .searchr1 import is_match
from .variables import number


@dataclass(frozen=True)
class Limits:
    """Limits of a turn."""

    calls: int
    """Limit of the calls in a response; further ones are answered by an error."""
    chars: int
    """Limit of an observation in characters."""


def limits() -> Limits:
    """Return the limits that the environment variables TOOL_MAX_CALLS and TOOL_MAX_CHARS set."""
    return Limits(number("TOOL_MAX_CALLS", "8", least=1), number("TOOL_MAX_CHARS", "4000", least=1))


class ToolError(RuntimeError):
    """An error of a tool that the model reads."""


@dataclass(frozen=True)
class Tool:
    """A tool that the model can call."""

    schema: dict[str, Any]
    call: Callable[[dict[str, Any]], Awaitable[str]]
    """Return the result. Raise ToolError with what the model reads."""

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]


async def observe(
    calls: list[dict[str, Any]], tools: Mapping[str, Tool], limits: Limits, extra_info: dict[str, Any]
) -> dict[str, Any]:
    """Return the result of `step` for a response with these calls, which run at the same time."""
    answers = await asyncio.gather(*(answer(call, tools, limits, place) for place, call in enumerate(calls)))
    messages = [
        {"role": "tool", "name": call["name"], "tool_call_id": f"call{place:05d}", "content": content}
        for place, (call, (content, _)) in enumerate(zip(calls, answers, strict=True))
    ]
    metrics = {"tool_calls": len(calls), "tool_errors": sum(is_error for _, is_error in answers)}
    result = {"next_state": messages, "reward": 0.0, "score": 0.0, "done": False, "extra_info": extra_info}
    return result | {"metrics": metrics}


async def answer(call: dict[str, Any], tools: Mapping[str, Tool], limits: Limits, place: int = 0) -> tuple[str, bool]:
    """Return what the model reads after a call, and whether it is an error."""
    try:
        if call["error"] is not None:
            raise ToolError(f"the call cannot be read: {call['error']}")
        if place >= limits.calls:
            raise ToolError(f"a response can have {limits.calls} calls")
        if call["name"] not in tools:
            raise ToolError(f"there is no tool {call['name']!r:.100}; there are {', '.join(tools)}")
        return shortened(await tools[call["name"]].call(call["arguments"]), limits.chars), False
    except ToolError as error:
        return shortened(f"error: {error}", limits.chars), True


def shortened(text: str, most: int) -> str:
    more = len(text) - most
    return text if more <= 0 else f"{text[:most]}... ({more} more characters)"


def is_right(answer: str, extra_info: dict[str, Any]) -> bool:
    """Return whether the last line of an answer, or the text after `####`, is the answer of the row.

    Numbers are compared as such, and other texts except for case, punctuation and articles.
    """
    _, mark, after = answer.rpartition("####")
    line = after.strip().partition("\n")[0] if mark else answer.rpartition("\n")[2]
    golds = extra_info["answer"] if isinstance(extra_info["answer"], list) else [extra_info["answer"]]
    for gold in map(str, golds):
        if is_match(line, gold) or (number_on(gold) is not None and number_on(line) == number_on(gold)):
            return True
    return False
