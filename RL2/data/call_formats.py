"""Formats in which models write tool calls: each reader splits a response into its calls and the text outside of them.

Nothing in a response is evaluated. Reading one takes time linear in its length, as the number of calls is limited.
A call that cannot be read is kept, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from RL2.data.literals import GEMMA, PYTHON, separated
from RL2.data.template import NAME

DEPTH = 64
"""Limit of the nesting of arguments; deeper ones exceed the recursion limit of code that copies them."""
MOST_CALLS = 128
"""Limit of the calls in a response; it also bounds the time that broken ones take."""
LITERALS = {"True": True, "False": False, "None": None}
"""Values that templates write as Python does, in formats whose arguments are not JSON."""
Tools = Sequence[dict[str, Any]]
"""Schemas of tools, as the chat template gets them."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool."""

    name: str
    """Empty if it cannot be read."""
    arguments: dict[str, Any]
    error: str | None = None
    """Reason why the call cannot be read."""
    text: str = ""
    """Text of a call that cannot be read."""


@dataclass(frozen=True)
class CallFormat:
    """A format of calls."""

    sign: str
    """Text in a rendered call of the tool `NAME` by which the format is recognised."""
    opening: str
    """Mark before a call."""
    read: Callable[[str, Tools], tuple[str, list[ToolCall]]]
    """Return the text outside of calls, and the calls."""


class _Unreadable(Exception):
    """An error: a call cannot be read."""

    def __init__(self, reason: str, name: str = "", end: int = -1) -> None:
        super().__init__(reason)
        self.name = name
        self.end = end
        """Offset after the call; -1 if its closing mark tells."""


def _read_marked(
    text: str,
    opening: str,
    closing: str,
    read: Callable[[int], tuple[list[ToolCall], int]],
    around: tuple[str, ...] = (),
) -> tuple[str, list[ToolCall]]:
    """Return the text outside of marked calls, and the calls.

    `read` returns the calls that begin at an offset after `opening`, and the offset after them. An unreadable call ends
    at `closing` or before the next `opening`. The marks `around` calls are not content.
    """
    outside: list[str] = []
    calls: list[ToolCall] = []
    at = 0
    while (start := text.find(opening, at)) >= 0:
        outside.append(text[at:start])
        body = start + len(opening)
        if len(calls) >= MOST_CALLS:
            calls.append(ToolCall("", {}, f"a response has at most {MOST_CALLS} calls", text[start:]))
            at = len(text)
            break
        try:
            found, at = read(body)
            calls += found
        except _Unreadable as error:
            at = error.end if error.end >= 0 else _end_of_call(text, body, opening, closing)
            calls.append(ToolCall(error.name, {}, str(error), text[start:at]))
    content = "".join([*outside, text[at:]])
    for mark in around:
        content = content.replace(mark, "")
    return content, calls


def _end_of_call(text: str, at: int, opening: str, closing: str) -> int:
    following = text.find(opening, at)
    stop = len(text) if following < 0 else following
    found = text.find(closing, at, stop) if closing else -1
    return stop if found < 0 else found + len(closing)


def _skip(pattern: re.Pattern[str], text: str, at: int = 0) -> int:
    """Return the offset after `pattern` at offset `at`."""
    found = pattern.match(text, at)
    return found.end() if found else at


def _closed(text: str, at: int, closing: str, opening: str, name: str) -> int:
    """Return the offset after `closing`. A response may end without it, and the next call may follow at once."""
    at = _skip(SPACE, text, at)
    if text.startswith(closing, at):
        return at + len(closing)
    if at < len(text) and not text.startswith(opening, at):
        raise _Unreadable(f"other text comes before {closing}", name)
    return at


def _json(text: str, at: int, name: str = "") -> tuple[Any, int]:
    """Return the JSON value at offset `at`, and the offset after it. Raise _Unreadable if there is none."""
    at = _skip(SPACE, text, at)
    try:
        value, end = DECODER.raw_decode(text, at)
        is_deep = _depth(value) > DEPTH
        if not is_deep:
            json.dumps(value, ensure_ascii=False).encode()
            return value, end
    except json.JSONDecodeError as error:
        raise _Unreadable(f"it is not JSON: {error.msg} at character {error.pos - at}", name) from error
    except UnicodeEncodeError as error:
        raise _Unreadable("a string has half of a surrogate pair", name) from error
    except ValueError as error:
        raise _Unreadable(f"it is not JSON: {error}", name) from error
    except RecursionError:
        pass
    raise _Unreadable(f"it is nested more than {DEPTH} levels deep", name)


def _depth(value: Any) -> int:
    """Return the number of nested levels of a JSON value."""
    levels, inner = 0, [value]
    while inner := [each for each in inner if isinstance(each, dict | list)]:
        levels += 1
        inner = [each for one in inner for each in (one.values() if isinstance(one, dict) else one)]
    return levels


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number")


def _call(value: Any) -> ToolCall:
    """Return the call that a JSON object describes."""
    if not isinstance(value, dict):
        raise _Unreadable(f"expected an object with a name and arguments, not {_kind(value)}")
    name = value.get("name")
    if not isinstance(name, str) or not name.strip():
        raise _Unreadable("it has no name of a tool")
    return ToolCall(name.strip(), _arguments(value.get("arguments", value.get("parameters")), name))


def _arguments(value: Any, name: str) -> dict[str, Any]:
    """Return the arguments of a call. None stand for an empty object, and text for the JSON in it."""
    if isinstance(value, str):
        value = _json(value, 0, name)[0]
    if value is not None and not isinstance(value, dict):
        raise _Unreadable(f"its arguments are {_kind(value)}, not an object", name)
    return value or {}


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _calls_at(text: str, at: int) -> tuple[list[ToolCall], int]:
    """Return the calls in one JSON object or a list of them."""
    value, end = _json(text, at)
    return [_call(each) for each in (value if isinstance(value, list) else [value])], end


def _hermes(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """Read `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    def read(at: int) -> tuple[list[ToolCall], int]:
        calls, end = _calls_at(text, at)
        return calls, _closed(text, end, "</tool_call>", "<tool_call>", calls[0].name if calls else "")

    return _read_marked(text, "<tool_call>", "</tool_call>", read)


def _llama(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """Read `{"name": ..., "parameters": {...}}`, with `;` between several, and `<|python_tag|>` before them.

    Without the tag, a response is a call only if it begins like one.
    """
    content, tag, body = text.partition("<|python_tag|>")
    if not tag:
        if not LLAMA_CALL.match(text):
            return text, []
        content, body = "", text
    calls: list[ToolCall] = []
    at = start = _skip(SPACE, body)
    try:
        while at < len(body):
            start = at
            found, at = _calls_at(body, at)
            calls += found
            at = _skip(SEPARATOR, body, at)
    except _Unreadable as error:
        calls.append(ToolCall(error.name, {}, str(error), body[start:]))
    return content, calls


def _mistral(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """Read `[TOOL_CALLS][{"name": ..., "arguments": {...}}]` and `[TOOL_CALLS]name[ARGS]{...}`."""

    def read(at: int) -> tuple[list[ToolCall], int]:
        head = MISTRAL_NAME.match(text, at)
        if head is None:
            return _calls_at(text, at)
        value, end = _json(text, head.end(), head[1])
        return [ToolCall(head[1], _arguments(value, head[1]))], end

    return _read_marked(text, "[TOOL_CALLS]", "", read)


def _deepseek(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """Read the calls of V3, with their type and a block of code, and of V3.1, with name and arguments alone."""

    def read(at: int) -> tuple[list[ToolCall], int]:
        head = DEEPSEEK_NAME.match(text, at)
        if head is None:
            raise _Unreadable("it has no name of a tool")
        name = head[1] or head[2]
        value, end = _json(text, head.end(), name)
        end = _skip(SPACE, text, end)
        end += 3 * text.startswith("```", end)
        return [ToolCall(name, _arguments(value, name))], _closed(text, end, DEEPSEEK_END, DEEPSEEK_BEGIN, name)

    return _read_marked(text, DEEPSEEK_BEGIN, DEEPSEEK_END, read, DEEPSEEK_AROUND)


def _gemma(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """Read `<|tool_call>call:name{key:<|"|>text<|"|>,other:1}<tool_call|>`."""

    def read(at: int) -> tuple[list[ToolCall], int]:
        head = GEMMA_NAME.match(text, at)
        if head is None:
            raise _Unreadable("it has no name of a tool")
        try:
            arguments, end = GEMMA.read(text, head.end(), DEPTH)
        except ValueError as error:
            raise _Unreadable(str(error), head[1]) from error
        return [ToolCall(head[1], arguments)], _closed(text, end, "<tool_call|>", "<|tool_call>", head[1])

    return _read_marked(text, "<|tool_call>", "<tool_call|>", read)


def _pythonic(text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
    """Read `<|tool_call_start|>[name(key=value), ...]<|tool_call_end|>`, or a JSON list between these marks."""

    def read(at: int) -> tuple[list[ToolCall], int]:
        start = _skip(SPACE, text, at)
        if JSON_LIST.match(text, start):
            calls, end = _calls_at(text, start)
        elif text.startswith("[", start):
            calls, end = _python_calls(text, _skip(SPACE, text, start + 1))
        else:
            raise _Unreadable("expected a list of calls")
        return calls, _closed(text, end, PYTHON_END, PYTHON_BEGIN, calls[0].name if calls else "")

    return _read_marked(text, PYTHON_BEGIN, PYTHON_END, read)


def _python_calls(text: str, at: int) -> tuple[list[ToolCall], int]:
    """Return the calls of a list, and the offset after it."""
    calls: list[ToolCall] = []
    name = ""
    try:
        while not text.startswith("]", at):
            head = PYTHON_NAME.match(text, at)
            if head is None or len(calls) >= MOST_CALLS:
                name = ""
                raise ValueError("it has no name of a tool" if head is None else f"it has more than {MOST_CALLS} calls")
            name, at = head[1], head.end()
            arguments: dict[str, Any] = {}
            while not text.startswith(")", at):
                key = PYTHON_KEY.match(text, at)
                if key is None:
                    raise ValueError("expected an argument as name=value")
                arguments[key[1]], at = _python_value(text, key.end())
                at = separated(text, at, ")")
            calls.append(ToolCall(name, arguments))
            at = separated(text, at + 1, "]")
    except ValueError as error:
        raise _Unreadable(str(error), name) from error
    return calls, at + 1


def _python_value(text: str, at: int) -> tuple[Any, int]:
    """Return the value of an argument, and the offset after it. Raise ValueError if there is none.

    The templates of LFM2 write quotes in a text as they are. Such a text ends where the next argument begins.
    """
    quote = text[at : at + 1]
    if quote not in PYTHON_TEXT_END:
        return PYTHON.read(text, at, DEPTH)
    try:
        value, end = PYTHON.read(text, at, DEPTH)
        if AFTER_VALUE.match(text, end):
            return value, end
    except ValueError:
        pass
    found = PYTHON_TEXT_END[quote].search(text, at + 1)
    if found is None:
        raise ValueError("a string is not closed")
    return text[at + 1 : found.start()], found.start() + 1


@dataclass(frozen=True)
class _Tags:
    """Reader of a format that writes each argument between tags."""

    opening: str
    closing: str
    name: re.Pattern[str]
    """Pattern of the name behind `opening`."""
    key: re.Pattern[str]
    """Pattern of the name of an argument, up to its value."""
    value_end: re.Pattern[str]
    """Pattern of the end of a value. Its group does not match at the end of a call that never closed the value."""
    around: tuple[str, ...] = ()
    """Marks around a call."""
    trims: bool = True
    """The lines of the tags are not part of a value."""

    def __call__(self, text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
        """Return the text outside of calls, and the calls."""
        schemas = _schemas(tools)
        return _read_marked(text, self.opening, self.closing, lambda at: self._read(text, at, schemas), self.around)

    def _read(self, text: str, at: int, schemas: dict[str, dict[str, Any]]) -> tuple[list[ToolCall], int]:
        head = self.name.match(text, at)
        if head is None:
            raise _Unreadable("it has no name of a tool")
        name, at = head[1], head.end()
        schema = schemas.get(name, {})
        arguments: dict[str, Any] = {}
        while key := self.key.match(text, at):
            end = self.value_end.search(text, key.end())
            if end is None or end[1] is None:
                reason = f"its argument {key[1]!r:.60} is not closed"
                raise _Unreadable(reason, name, len(text) if end is None else end.end())
            value = text[key.end() : end.start()]
            if self.trims:
                value = value.removeprefix("\n").removesuffix("\n")
            arguments[key[1]] = _typed(value, schema.get(key[1]))
            at = end.end()
        return [ToolCall(name, arguments)], _closed(text, at, self.closing, self.opening, name)


def _schemas(tools: Tools) -> dict[str, dict[str, Any]]:
    """Return the schemas of the arguments of each tool, by its name. Leave out what is not a schema."""
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, dict) else None
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        if isinstance(properties, dict):
            found[str(function.get("name"))] = properties
    return found


def _typed(text: str, schema: Any) -> Any:
    """Return the value of an argument that is written without quotes.

    It is `text` itself if its schema wants a string, and otherwise the JSON in it, if there is any. Without a schema,
    quotes belong to a string.
    """
    wanted = schema.get("type") if isinstance(schema, dict) else None
    if wanted == "string" or (wanted is None and text.lstrip().startswith('"')):
        return text
    if text.strip() in LITERALS:
        return LITERALS[text.strip()]
    try:
        value, end = _json(text, 0)
    except _Unreadable:
        return text
    return text if text[end:].strip() else value


def read_harmony(text: str, reads_calls: bool = True) -> tuple[str, str, list[ToolCall]]:
    """Return content, reasoning and calls of messages `<|start|>assistant<|channel|>NAME to=TOOL<|message|>...<|end|>`.

    The channel `analysis` is reasoning, a message to a recipient is a call, and everything else is content. Without
    `reads_calls`, a call is content, too. The mark `<|start|>` of the first message belongs to the prompt.
    """
    reasoning: list[str] = []
    content: list[str] = []
    calls: list[ToolCall] = []
    for written in text.split("<|start|>"):
        header, mark, rest = written.partition("<|message|>")
        body = HARMONY_END.split(rest, maxsplit=1)[0]
        recipient, channel = RECIPIENT.search(header), CHANNEL.search(header)
        if recipient and recipient[1] != "user" and not reads_calls:
            content.append(written)
        elif recipient and recipient[1] != "user":
            calls.append(_harmony_call(recipient[1].removeprefix("functions."), body if mark else None, written))
        elif not mark:
            content += [] if channel else [header.removeprefix("assistant")]
        elif channel and channel[1] == "analysis":
            reasoning.append(body)
        else:
            content.append(body)
    return "\n".join(filter(None, content)), "\n".join(filter(None, reasoning)), calls


def _harmony_call(name: str, body: str | None, written: str) -> ToolCall:
    try:
        if body is None:
            raise _Unreadable("it has no message", name)
        value, end = _json(body, 0, name) if body.strip() else (None, len(body))
        if body[end:].strip():
            raise _Unreadable("other text comes after its arguments", name)
        return ToolCall(name, _arguments(value, name))
    except _Unreadable as error:
        return ToolCall(error.name, {}, str(error), written)


def read_atem(text: str, reads_calls: bool = True, tools: Tools = ()) -> tuple[str, str, list[ToolCall]]:
    """Return content, reasoning and calls of messages `<|start|>assistant to=RECIPIENT<|message|>...<|eom|>`.

    A message to `self` is reasoning, one to another recipient than `user` has the call, and everything else is content.
    """
    parts: dict[str, list[str]] = {"self": [], "user": []}
    calls: list[ToolCall] = []
    for written in text.split("<|start|>"):
        header, mark, rest = written.partition("<|message|>")
        body = ATEM_END.split(rest if mark else header.removeprefix("assistant"), maxsplit=1)[0]
        recipient = RECIPIENT.search(header) if mark else None
        if recipient is None or recipient[1] in parts:
            parts[recipient[1] if recipient else "user"].append(body)
        elif reads_calls:
            content, found = ATEM_TAGS(body, tools)
            calls += found
            parts["user"].append(content.strip())
        else:
            parts["user"].append(written)
    reasoning, content = ("\n".join(filter(None, parts[name])) for name in ("self", "user"))
    return content, reasoning, calls


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
SPACE = re.compile(r"\s*")
SEPARATOR = re.compile(r"[\s;]*")
LLAMA_CALL = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"]*"\s*,\s*"(?:parameters|arguments)"\s*:'
)
MISTRAL_NAME = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\][^\s\[\]{}]*\s*)?(?:\[ARGS\])?")
DEEPSEEK_BEGIN, DEEPSEEK_END = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
GEMMA_NAME = re.compile(r"\s*call:([^\s{}<>]+)\s*(?=\{)")
PYTHON_BEGIN, PYTHON_END = "<|tool_call_start|>", "<|tool_call_end|>"
PYTHON_NAME = re.compile(r"([^\W\d][\w.-]*)\s*\(\s*")
PYTHON_KEY = re.compile(r"([^\W\d]\w*)\s*=\s*")
JSON_LIST = re.compile(r"\[\s*\{")
AFTER_VALUE = re.compile(r"\s*(?:,\s*(?:[^\W\d]\w*\s*=|\))|\))")
PYTHON_TEXT_END = {
    quote: re.compile(rf"{quote}(?=\s*(?:,\s*[^\W\d]\w*\s*=|\)\s*(?:,\s*[^\W\d]|\])))") for quote in ("'", '"')
}
"""Patterns of the quote that ends a text with quotes of the same kind in it."""
DEEPSEEK_AROUND = ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>")
DEEPSEEK_NAME = re.compile(
    r"\s*[^\s<>{}]+\s*<\uff5ctool\u2581sep\uff5c>\s*([^\s<>{}`]+)\s*(?:```(?:json)?)?"
    r"|\s*([^\s<>{}]+)\s*<\uff5ctool\u2581sep\uff5c>"
)
HARMONY_SIGN = f"to=functions.{NAME}"
"""Text in a rendered call by which the format of gpt-oss is recognised."""
HARMONY_END = re.compile(r"<\|(?:end|call|return)\|>")
ATEM_SIGN = f'<atem:invoke name="{NAME}">'
"""Text in a rendered call by which the format of Muse is recognised."""
ATEM_END = re.compile(r"<\|(?:eom|eot)\|>")
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
CHANNEL = re.compile(r"<\|channel\|>(\w+)")
FUNCTION_TAGS = _Tags(
    opening="<function=",
    closing="</function>",
    name=re.compile(r"\s*([^\s<>]+)\s*>"),
    key=re.compile(r"\s*<parameter=([^<>\n]+)>"),
    value_end=re.compile(r"(</parameter>)(?=\s*(?:<parameter=|</function>|\Z))|</function>\s*</tool_call>"),
    around=("<tool_call>", "</tool_call>"),
)
ARGUMENT_TAGS = _Tags(
    opening="<tool_call>",
    closing="</tool_call>",
    name=re.compile(r"\s*([^\s<>{}]+)"),
    key=re.compile(r"\s*<arg_key>([^<>]+)</arg_key>\s*<arg_value>"),
    value_end=re.compile(r"(</arg_value>)(?=\s*(?:<arg_key>|</tool_call>|\Z))|</tool_call>(?=\s*(?:<tool_call>|\Z))"),
)
ATEM_TAGS = _Tags(
    opening='<atem:invoke name="',
    closing="</atem:invoke>",
    name=re.compile(r'([^\s<>"]+)"\s*>'),
    key=re.compile(r'\s*<atem:parameter name="([^<>"\n]+)">'),
    value_end=re.compile(r"(</atem:parameter>)(?=\s*(?:<atem:parameter|</atem:invoke>|\Z))|</atem:invoke>"),
    around=("<atem:function_calls>", "</atem:function_calls>"),
    trims=False,
)
FORMATS = (
    CallFormat("<|tool_call>call:", "<|tool_call>", _gemma),
    CallFormat(PYTHON_BEGIN, PYTHON_BEGIN, _pythonic),
    CallFormat(DEEPSEEK_BEGIN, DEEPSEEK_BEGIN, _deepseek),
    CallFormat("[TOOL_CALLS]", "[TOOL_CALLS]", _mistral),
    CallFormat(f"<function={NAME}>", "<function=", FUNCTION_TAGS),
    CallFormat(f"<tool_call>{NAME}", "<tool_call>", ARGUMENT_TAGS),
    CallFormat("<tool_call>", "<tool_call>", _hermes),
    CallFormat(f'{{"name": "{NAME}", "parameters"', '{"name"', _llama),
)
"""Formats other than that of gpt-oss. The first whose sign is in a rendered call is that of the template."""
