"""Conversion of a row's `prompt` (raw text) or `messages` (chat) to text and token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from RL2.data.bad_rows import FatalDataError
from RL2.data.source import DataError, Row, from_json, keys, shown
from RL2.data.watchdog import Watchdog

Message = dict[str, Any]

MAX_RENDERED = 1 << 26
"""Limit of the characters that a template may render from one conversation."""


def messages_of(row: Row) -> list[Message]:
    """Return the validated `messages` of a row: contents as strings, call arguments as objects, null keys removed."""
    messages = from_json(row.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'messages' must be a list of at least one message, not {shown(messages)}")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{name} must be an object with 'role' and 'content', not {shown(message)}")
    message = {key: value for key, value in message.items() if value is not None}  # null keys come from other rows
    role, calls = message.get("role"), from_json(message.get("tool_calls"))
    if role is None:
        raise DataError(f"{name} has no 'role'")
    if not isinstance(role, str):
        raise DataError(f"{name}.role must be text, not {shown(role)}")
    content = message["content"] = _text(message.get("content"), name)
    if calls:
        if not isinstance(calls, list):
            raise DataError(f"{name}.tool_calls must be a list, not {shown(calls)}")
        message["tool_calls"] = [_call(call, f"{name}.tool_calls[{n}]") for n, call in enumerate(calls)]
    else:
        message.pop("tool_calls", None)
        if content is None:
            raise DataError(f"{name} has no 'content'")
    if role == "user" and not (content or "").strip():
        raise DataError(f"{name} is empty")
    return message


def _text(content: Any, name: str) -> str | None:
    """Return a content as one string; rows in OpenAI's format may split it into parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"{name}.content must be text or a list of text parts, not {shown(content)}")
    for part in content:
        if not isinstance(part.get("text"), str):
            raise DataError(f"{name}.content has a part without text: {shown(part)}")
    return "".join(part["text"] for part in content)


def _call(call: Any, name: str) -> dict[str, Any]:
    """Return a tool call as an object with `function`; arguments that are JSON strings are decoded."""
    if isinstance(call, dict) and not isinstance(call.get("function"), dict):
        call = {"type": "function", "function": call}
    function = call["function"] if isinstance(call, dict) else {}
    arguments = from_json(function.get("arguments", {}))
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise DataError(f"{name} must have a 'function' with 'name' and an object as 'arguments', not {shown(call)}")
    return call | {"function": function | {"arguments": arguments}}


def template_arguments(row: Row) -> dict[str, Any]:
    """Return the template's arguments beside the messages: `tools` and the entries of `chat_template_kwargs`."""
    arguments = from_json(row.get("chat_template_kwargs") or {})
    if not isinstance(arguments, dict):
        raise DataError(f"'chat_template_kwargs' must be an object, not {shown(arguments)}")
    arguments = {key: value for key, value in arguments.items() if value is not None}
    tools = from_json(row.get("tools"))
    if tools:
        tools = [from_json(tool) for tool in tools] if isinstance(tools, list) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f"'tools' must be a list of objects, not {shown(tools)}")
        arguments["tools"] = tools
    return arguments


@contextmanager
def template_errors(watchdog: Watchdog) -> Iterator[None]:
    """Convert any error of a chat template in the `with` block to DataError, and a timeout to FatalDataError.

    A template may refuse messages in many ways: an unknown role, two turns of one side, a missing field.
    """
    try:
        with watchdog.watching():
            yield
    except TimeoutError as error:
        raise FatalDataError(f"the chat template refuses the messages: {error}") from error
    except Exception as error:
        raise DataError(f"the chat template refuses the messages: {str(error) or type(error).__name__}") from error


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    watchdog: Watchdog,
    *,
    add_generation_prompt: bool,
    **arguments: Any,
) -> str:
    """Render the messages with the chat template; `arguments` are passed to it."""
    if tokenizer.chat_template is None:
        raise FatalDataError(
            "the tokenizer has no chat template; pass rows with 'prompt' or a tokenizer with a chat template"
        )
    with template_errors(watchdog):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **arguments
        )
    assert isinstance(text, str)
    if len(text) > MAX_RENDERED:
        raise DataError(f"the chat template renders the messages as {len(text)} characters, more than {MAX_RENDERED}")
    return unicode(text, "what the chat template makes of the messages")


def unicode(text: str, what: str) -> str:
    """Return `text`. Raise DataError if it is not valid Unicode: JSON can hold a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} has half of a surrogate pair at character {error.start}") from error
    return text


def is_chat(row: Row) -> bool:
    """Return whether the row has `messages`; otherwise validate its raw `prompt`."""
    # a null key belongs to other rows of the file
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is None and messages is None:
        hint = "example(row) in the environment script (rollout.env_path, in SFT data.env_path) can convert others"
        raise DataError(f"neither 'prompt' nor 'messages'; its keys are {keys(row)}; {hint}")
    if prompt is None:
        return True
    if messages is not None:
        raise DataError("both 'prompt' and 'messages'; pass one of them")
    if not isinstance(prompt, str):
        hint = "; chat messages go under 'messages'" if isinstance(prompt, list) else ""
        raise DataError(f"'prompt' must be text, not {shown(prompt)}{hint}")
    if not prompt.strip():
        raise DataError("'prompt' is empty")
    unicode(prompt, "'prompt'")
    return False


def question_of(row: Row) -> list[Message]:
    """Return the validated `messages` of a row for reinforcement learning.

    Raise DataError if they end with the assistant: the solution would be part of the prompt.
    """
    messages = messages_of(row)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "'messages' end with the assistant, so the prompt would contain the answer; remove that turn "
            "(example(row) of the environment script can)"
        )
    return messages


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, begins: bool) -> list[list[int]]:
    """Return the token ids of each text; with `begins`, each starts with the tokenizer's prefix (BOS) exactly once."""
    if not texts:
        return []
    ids = _plain(tokenizer, texts)
    head = head_of(tokenizer) if begins else []
    return [each if each[: len(head)] == head else head + each for each in ids]


def head_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer puts before a text, such as BOS. A suffix, such as EOS, is ignored."""
    around, (plain,) = list(tokenizer("a").input_ids), _plain(tokenizer, ["a"])
    starts = (at for at in range(len(around)) if around[at : at + len(plain)] == plain)
    return around[: next(starts, 0)]


def _plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus or len(texts) == 1:
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    # the same without offsets and copies, which take a third of the time; the call configures the encoder
    _plain(tokenizer, texts[:1])
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
