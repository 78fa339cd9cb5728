"""Chat template of a tokenizer: the message format it reads, the text it renders, and its end-of-turn tokens.

Templates differ in what they read (strings or lists of parts, arguments as objects or JSON strings, the key of the
reasoning) and in what they write after a turn. None of it is declared, so small conversations are rendered to find out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import FatalDataError
from RL2.data.chat import Message, render
from RL2.data.source import DataError
from RL2.data.watchdog import Watchdog
from RL2.errors import ConfigError, first_line, printable

TEMPLATE_LIMIT_S = 10.0
"""Time limit of one rendering. Templates come with models, and jinja's sandbox does not limit their time."""
MARK, NAME, VALUE, CALL_ID = "zqxmark", "zqxname", "zqxvalue", "zqx123456"
"""Marks to look for in rendered text; no template writes them by itself."""
ASK: Message = {"role": "user", "content": "."}
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which templates and data sets store the reasoning of a turn."""


@dataclass(frozen=True)
class Chat:
    """A conversation and the template's arguments for it."""

    messages: list[Message]
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments such as `tools`, and settings of the template such as `enable_thinking`."""


class Template:
    """Chat template of a tokenizer; it may be missing."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit_s: float = TEMPLATE_LIMIT_S) -> None:
        """Probe the template of `tokenizer`; `limit_s` limits one rendering in seconds."""
        self.tokenizer = tokenizer
        name = printable(str(tokenizer.name_or_path))
        self.watchdog = Watchdog(
            limit_s,
            f"the chat template of {name} takes longer than {limit_s:g} s over one conversation, or 4 GiB of memory, "
            "and cannot be interrupted; the process is killed",
        )
        self.parts = False
        """True if the template reads contents only as lists of parts."""
        self.empty: str | None = ""
        """Content that the template needs beside calls without text."""
        self.text_arguments = False
        """True if the template needs the arguments of calls as JSON strings."""
        self.reasoning: str | None = None
        """Key from which the template reads the reasoning."""
        self.end, self.call_end = "", ""
        """Tokens that end a turn, and a turn with calls; empty if no single token does."""
        self.ends_with_next = False
        """True if the first token of the next turn ends a turn (GLM)."""
        self.ends: tuple[str, ...] = tuple(filter(None, [str(tokenizer.eos_token or "")]))
        """Texts of all tokens that end a turn."""
        self.header = ""
        """Text that opens the assistant's turn."""
        self.reasoning_text, self.call_text = "", ""
        """Rendered turns with the reasoning `MARK` and with a call of the tool `NAME`; empty if there are none."""
        if tokenizer.chat_template is not None:
            self._find_out()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of `ends`, sorted."""
        ids = self.tokenizer.convert_tokens_to_ids(list(self.ends))
        assert isinstance(ids, list)
        return tuple(sorted(ids))

    def render(self, chat: Chat, number: int | None = None, *, add_generation_prompt: bool = False) -> str:
        """Render the first `number` messages of the conversation, by default all."""
        messages = self.as_read(chat.messages[:number])
        return render(
            self.tokenizer, messages, self.watchdog, add_generation_prompt=add_generation_prompt, **chat.arguments
        )

    def ask(self, chat: Chat) -> str:
        """Render the prompt of the assistant's next turn. Raise DataError if the template drops part of it."""
        text = self.render(chat, add_generation_prompt=True)
        self.refuse_lost_around(chat, text)
        for message in chat.messages:
            if message.get("tool_calls"):
                self.refuse_lost(message, text, but="the reasoning")
        return text

    def end_of_turn(self, text: str, start: int) -> int:
        """Return the offset in `text` after the end token of its last turn, which begins at `start`.

        After that token a template may write a newline or the EOS token; neither is sampled.
        """
        found = _last(text, self.ends, start, len(text))
        if found is None:
            return len(text)
        while (before := _last(text, self.ends, start, found[0])) and not text[before[1] : found[0]].strip():
            found = before
        return found[1]

    def behind_calls(self, messages: list[Message], arguments: dict[str, Any]) -> str:
        """Return what is written behind a response with calls, from its end token to the header of the next response.

        `messages` begin with the results of the calls, of the role `tool`. Raise DataError if the template drops a part
        of them, except reasoning.
        """
        results = list(takewhile(lambda message: message["role"] == "tool", messages))
        calls = [_call_before(result) for result in results]
        calls[-1]["function"]["arguments"] = {"of": VALUE}
        question: Message = {"role": "user", "content": "."}
        refusal = "the chat template drops a call before its result"
        for written in (calls, calls[-1:]):  # some templates write one call a turn
            turn: Message = {"role": "assistant", "content": None, "tool_calls": written}
            try:
                said = self.render(Chat([question, turn], arguments)).rpartition(VALUE)[2]
                text = self.render(Chat([question, turn, *messages], arguments), add_generation_prompt=True)
            except FatalDataError:
                raise
            except DataError as error:
                refusal = str(error)
                continue
            behind = text.partition(VALUE)[2]
            stop = self.end_of_turn(said, 0)
            stop -= next((len(end) for end in self.ends if said[:stop].endswith(end)), 0)
            if said and behind.startswith(said[:stop]):
                for message in messages:  # reasoning of earlier turns is the template's to keep or drop
                    self.refuse_lost(message, behind, but="the reasoning")
                return behind[stop:]
        raise DataError(refusal)

    def refuse_lost(self, message: Message, text: str, *, but: str = "") -> None:
        """Raise DataError if the rendered `text` lacks a part of `message`; `but` names a kind of part to ignore."""
        for what, part in _says(message):
            written = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
            if what != but and not any(form in text for form in written):
                raise DataError(f"the chat template leaves out {what} of the {message['role']}: {part!r:.60}")

    def refuse_lost_around(self, chat: Chat, text: str) -> None:
        """Raise DataError if the rendered conversation `text` lacks a question, an instruction or a tool."""
        for message in chat.messages:
            if message["role"] in ("system", "user"):
                self.refuse_lost(message, text)
        for tool in chat.arguments.get("tools", []):
            function = tool.get("function", tool)
            if isinstance(function, dict) and str(function.get("name", "")) not in text:
                raise DataError(f"the chat template leaves out the tool {function['name']!r}")

    def as_read(self, messages: list[Message]) -> list[Message]:
        """Return the messages in the form that the template reads."""
        return [self._as_read(message) for message in messages]

    def _as_read(self, message: Message) -> Message:
        """Return the message in the form that the template reads."""
        message = dict(message)
        reasoning = next((message[key] for key in REASONING if message.get(key)), "")
        content = message.get("content")
        if not reasoning and self.reasoning and message["role"] == "assistant" and isinstance(content, str):
            # some templates do not find it in the content and open a second one
            reasoning = reasoning_of(message).strip("\n")
            message["content"] = content.rpartition("</think>")[2].lstrip("\n") if reasoning else content
        for key in REASONING:
            message.pop(key, None)
        if reasoning:
            message[self.reasoning or REASONING[0]] = reasoning
        if message.get("tool_calls"):
            message["content"] = message.get("content") or self.empty
            if self.text_arguments:
                message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        if self.parts and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _find_out(self) -> None:
        """Render small conversations and record what the template does with them.

        A conversation that the template refuses counts as an empty text.
        """
        asked: Message = {"role": "user", "content": MARK}
        if MARK not in self._try([asked]):
            self.parts = True
            self.parts = MARK in self._try([asked])
        closed, opened = self._try([ASK]), self._try([ASK], add_generation_prompt=True)
        self.header = opened.removeprefix(closed) if opened.startswith(closed) else ""
        for key in REASONING:
            self.reasoning = key
            turn = self._try([ASK, {"role": "assistant", "content": ".", key: MARK}])
            if MARK in turn:
                self.reasoning_text = turn.removeprefix(closed)
                break
        else:
            self.reasoning = None
        answer: Message = {"role": "assistant", "content": MARK}
        behind = self._try([ASK, answer]).rpartition(MARK)[2]
        before_next = self._try([ASK, answer, ASK]).rpartition(MARK)[2]
        self.end = self._first_added(behind)
        if not self.end:
            self.end = self._first_added(before_next, at_once=True)
            self.ends_with_next = bool(self.end)
        eos = str(self.tokenizer.eos_token or "")
        if eos and behind.startswith(self.end + eos) and before_next.startswith(self.end + eos):
            self.end = eos  # the text before it belongs to the answer (Command R7B)
        if call := self._find_call():
            turn = self._try([ASK, call])
            self.call_text = turn.removeprefix(closed)
            behind = turn.rpartition(VALUE)[2]
            reply: Message = {"role": "tool", "tool_call_id": CALL_ID, "name": NAME, "content": MARK}
            whole = self._try([ASK, call, reply])
            if self.end and self.end in behind:
                self.call_end = self.end
            else:
                self.call_end = self._special_at_end(behind)
                if not self.call_end and whole.startswith(turn):
                    self.call_end = self._first_added(whole[len(turn) :], at_once=True)
        self.ends = tuple(dict.fromkeys(filter(None, [*self.ends, self.end, self.call_end])))

    def _find_call(self) -> Message | None:
        """Return a tool call in the form that the template reads; None if it reads none."""
        function = {"name": NAME, "arguments": {"of": VALUE}}
        call: Message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": CALL_ID, "type": "function", "function": function}],
        }
        for self.text_arguments in (False, True):
            for self.empty in ("", None):
                text = self._try([ASK, call])
                # an empty content may be rendered as None, and arguments encoded twice contain a backslash
                if NAME in text and VALUE in text and "None" not in text and "\\" not in text:
                    return call
        self.text_arguments, self.empty = False, ""
        return None

    def _try(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self.render(Chat(messages), add_generation_prompt=add_generation_prompt)
        except FatalDataError:
            raise
        except DataError:
            return ""

    def _first_added(self, text: str, *, at_once: bool = False) -> str:
        """Return the first added token in `text`; with `at_once`, only if the text begins with it."""
        added = [token for token in self.tokenizer.get_added_vocab() if token.strip() and token in text]
        first = min(added, key=lambda token: (text.index(token), -len(token)), default="")
        is_bos = first == self.tokenizer.bos_token != self.tokenizer.eos_token
        return "" if is_bos or (at_once and not text.lstrip().startswith(first)) else first

    def _special_at_end(self, text: str) -> str:
        """Return the special token with which `text` ends, ignoring spaces."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = [t.content for t in tokens if t.special and t.content.strip() and text.rstrip().endswith(t.content)]
        return max(special, key=len, default="")


def change_template(
    tokenizer: PreTrainedTokenizerBase, file: str | None, arguments: dict[str, Any], group: str
) -> None:
    """Set the tokenizer's chat template from `file`, if given, with `arguments` as defaults of its settings.

    The defaults are written into the template, so that an exported model has them too. `group` is the prefix of the
    configuration keys. Raise ConfigError if the file cannot be read or the template does not use an argument.
    """
    if file is not None:
        try:
            tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{group}.chat_template={file} cannot be read: {first_line(error)}") from error
    if not arguments:
        return
    templates = tokenizer.chat_template
    if templates is None:
        raise ConfigError(f"{group}.chat_template_kwargs has no effect: the tokenizer has no chat template")
    for name in arguments:
        if not name.isidentifier() or not re.search(rf"\b{name}\b", str(templates)):
            raise ConfigError(f"{group}.chat_template_kwargs.{name} has no effect: the chat template does not read it")
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in arguments.items()
    )
    # keep the template's own first newline: that of the defaults is trimmed
    if isinstance(templates, dict):
        tokenizer.chat_template = {key: f"{defaults}\n{text}" for key, text in templates.items()}
    else:
        tokenizer.chat_template = f"{defaults}\n{templates}"


def reasoning_of(message: Message) -> str:
    """Return the reasoning of a turn: from a key of its own, or from the content before `</think>`."""
    for key in REASONING:
        if message.get(key):
            return str(message[key])
    before, mark, _ = str(message.get("content") or "").rpartition("</think>")
    return before.rpartition("<think>")[2] if mark else ""


def _says(message: Message) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) for each part of a message that must be rendered."""
    if message["role"] == "assistant" and reasoning_of(message).strip():
        yield "the reasoning", reasoning_of(message).strip()
    content = str(message.get("content") or "")
    answer = content.rpartition("</think>")[2] if message["role"] == "assistant" else content
    if answer.strip():
        yield "the content", answer.strip()
    for call in message.get("tool_calls") or []:
        yield "a call", call["function"]["name"]
        yield from (("an argument of a call", text) for text in _texts(call["function"]["arguments"]))


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in nested objects and lists, including keys."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _call_before(result: Message) -> dict[str, Any]:
    """Return a call that a message of the role `tool` answers."""
    function = {"name": result.get("name", NAME), "arguments": {}}
    return {"id": result.get("tool_call_id", CALL_ID), "type": "function", "function": function}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _last(text: str, ends: tuple[str, ...], start: int, stop: int) -> tuple[int, int] | None:
    """Return start and end of the last of `ends` in text[start:stop]; None if there is none."""
    found = [(at, at + len(end)) for end in ends if (at := text.rfind(end, start, stop)) >= 0]
    return max(found, default=None)
