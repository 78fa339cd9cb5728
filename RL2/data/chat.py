"""From a row's `prompt` (raw text) or `messages` (chat) to text and token ids."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from RL2.data.source import DataError, Row, in_row, keys, shown
from RL2.scripts import raise_in

Message = dict[str, Any]

TEMPLATE_LIMIT_S = 10.0
"""Of one rendering. Templates come with models, and jinja's sandbox keeps them from everything but taking time."""
MAX_RENDERED = 1 << 26
"""Characters that a template may make of a row's messages."""


def from_json(value: Any) -> Any:
    """`value`, decoded if it is a text that holds JSON: CSV has no other way to carry lists and objects."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):  # no JSON, or none that Python reads
            pass
    return value


def messages_of(row: Row) -> list[Message]:
    """The checked `messages` of a row."""
    messages = from_json(row.get("messages"))
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'messages' must be a list of at least one message, not {shown(messages)}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"messages[{number}] must be an object with 'role' and 'content', not {shown(message)}")
        role, content = message.get("role"), message.get("content")
        if role is None:
            raise DataError(f"messages[{number}] has no 'role'")
        if not isinstance(role, str):
            raise DataError(f"messages[{number}].role must be text, not {shown(role)}")
        if content is None and not message.get("tool_calls"):
            raise DataError(f"messages[{number}] has no 'content'")
        if content is not None and not isinstance(content, str):
            raise DataError(f"messages[{number}].content must be text, not {shown(content)}")
        if role == "user" and not (content or "").strip():
            raise DataError(f"messages[{number}] is empty")
    return messages


@contextmanager
def template_errors() -> Iterator[None]:
    """A template may refuse messages in many ways: an unknown role, two turns of the same side, a missing field.

    Or it is wrong itself, and raises anything; or it goes on for ever, and is interrupted after `TEMPLATE_LIMIT_S`.
    """
    try:
        with _interrupted_after(TEMPLATE_LIMIT_S):
            yield
    except Exception as error:
        raise DataError(f"the chat template refuses the messages: {str(error) or type(error).__name__}") from error


@contextmanager
def _interrupted_after(limit_s: float) -> Iterator[None]:
    """Raise TimeoutError in the Python code that runs within, once it takes longer. In any thread, unlike signals."""
    thread, lock, is_over = threading.get_ident(), threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not is_over:
                raise_in(thread, TimeoutError)

    timer = threading.Timer(limit_s, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimeoutError as error:
        raise TimeoutError(f"it takes longer than {limit_s:g} s") from error
    finally:
        timer.cancel()
        with lock:
            is_over = True
            raise_in(thread, None)  # one that came too late


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template; pass rows with 'prompt' or a tokenizer with a chat template"
        )
    with template_errors():
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    if len(text) > MAX_RENDERED:
        raise DataError(f"the chat template makes {len(text)} characters of the messages")
    return unicode(text, "what the chat template makes of the messages")


def unicode(text: str, what: str) -> str:
    """`text`, unless it is none: JSON can write one half of a surrogate pair alone, which no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} has half of a surrogate pair at character {error.start}") from error
    return text


def is_chat(row: Row) -> bool:
    """Whether the row carries `messages`; if not, it carries a raw `prompt`, which is checked here."""
    # a null is a column that other rows of the file use
    prompt, messages = row.get("prompt"), row.get("messages")
    if prompt is None and messages is None:
        hint = "example(row) in the environment script (rollout.env_path, in SFT data.env_path) can make them of others"
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
    """Return the checked `messages` of a row for reinforcement learning, in which the model is to answer.

    Raise DataError if they end with the assistant: demonstrations would put the solution into the prompt.
    """
    messages = messages_of(row)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "'messages' end with the assistant, whose answer would stand in the prompt; leave that turn out "
            "(example(row) of the environment script can)"
        )
    return messages


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of many texts at once."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False).input_ids


def encode_prompts(tokenizer: PreTrainedTokenizerBase, path: str, rows: list[Row]) -> list[tuple[str, list[int]]]:
    """(text, token ids) of every row's prompt; `path` is for errors.

    A raw prompt gets what the tokenizer puts around a text, such as BOS; a rendered chat has it already.
    """
    texts: dict[bool, dict[int, str]] = {True: {}, False: {}}
    for number, row in enumerate(rows):
        with in_row(path, number):
            chat = is_chat(row)
            text = render(tokenizer, question_of(row), add_generation_prompt=True) if chat else row["prompt"]
            if not text:
                raise DataError("the chat template makes an empty prompt of the messages")
            texts[chat][number] = text
    prompts = dict[int, tuple[str, list[int]]]()
    for chat, part in texts.items():
        token_ids = encode(tokenizer, list(part.values()), add_special_tokens=not chat)
        prompts |= {n: (text, ids) for (n, text), ids in zip(part.items(), token_ids, strict=True)}
    return [prompts[number] for number in range(len(rows))]
