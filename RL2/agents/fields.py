"""Checked reading of the fields of a request, which anyone may have written."""

from __future__ import annotations

from typing import Any

from RL2.agents.protocol import RequestError
from RL2.data.chat import unicode
from RL2.data.source import DataError, shown

SAMPLING = "responses are sampled from the policy itself, with no other settings than temperature and top_p"
FREE = "nothing constrains the sampling"
RENDERED = "the endpoint renders the conversation itself"

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), SAMPLING),
    "presence_penalty": ((0,), SAMPLING),
    "repetition_penalty": ((1,), SAMPLING),
    "length_penalty": ((1,), SAMPLING),
    "logit_bias": (({},), SAMPLING),
    "top_k": ((-1, 0), SAMPLING),
    "min_p": ((0,), SAMPLING),
    "min_tokens": ((0,), SAMPLING),
    "use_beam_search": ((False,), SAMPLING),
    "ignore_eos": ((False,), SAMPLING),
    "stop_token_ids": (([],), "stop takes strings only"),
    "include_stop_str_in_output": ((False,), "a stop string is never part of the answer"),
    "bad_words": (([],), FREE),
    "allowed_token_ids": (([],), FREE),
    "structured_outputs": ((), FREE),
    "guided_json": ((), FREE),
    "guided_regex": ((), FREE),
    "guided_choice": ((), FREE),
    "guided_grammar": ((), FREE),
    "prompt_logprobs": ((), "log-probabilities are kept of sampled tokens only"),
    "echo": ((False,), "log-probabilities and texts are kept of sampled tokens only"),
    "continue_final_message": ((False,), RENDERED),
    "add_generation_prompt": ((True,), RENDERED),
    "chat_template": ((), RENDERED),
    "documents": (([],), RENDERED),
}
"""Parameters that would change the answer and have no counterpart here: the values without effect, and the reason."""

TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}
"""Types of the parts of a content that are text, with the key of the text."""


def refuse(body: dict[str, Any], neutral: dict[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raise RequestError if the body has a parameter of the table `neutral` with a value that has an effect."""
    for key, (values, reason) in neutral.items():
        value = body.get(key)
        if value is not None and value not in values:
            raise RequestError(f"{key}={shown(value)} is not supported: {reason}; leave it out", parameter=key)


def flag(body: dict[str, Any], key: str, default: bool = False) -> bool:
    """Return a truth value of the body."""
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{key}={shown(value)} must be true or false", parameter=key)
    return value


def whole(body: dict[str, Any], key: str, low: int, high: int) -> int | None:
    """Return an integer of the body, None if it has none."""
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{key}={shown(value)} must be an integer from {low} to {high}", parameter=key)
    return value


def number(body: dict[str, Any], key: str, low: float, high: float) -> float | None:
    """Return a number of the body, None if it has none."""
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{key}={shown(value)} must be a number from {low} to {high}", parameter=key)
    return float(value)


def text(body: dict[str, Any], key: str, where: str = "") -> str | None:
    """Return a string of the body, None if it has none; `where` is the name of the body in errors."""
    value = body.get(key)
    return None if value is None else string(value, f"{where}.{key}" if where else key)


def string(value: Any, where: str) -> str:
    """Return a string. Raise RequestError if `value` is none, or not valid Unicode."""
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a string, not {shown(value)}", parameter=where)
    try:
        return unicode(value, where)
    except DataError as error:
        raise RequestError(str(error), parameter=where) from error


def item(value: Any, where: str) -> dict[str, Any]:
    """Return an object. Raise RequestError if `value` is none."""
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be an object, not {shown(value)}", parameter=where)
    return value


def items(body: dict[str, Any], key: str, where: str = "") -> list[tuple[dict[str, Any], str]]:
    """Return the objects of a list of the body, each with its name for errors; none if there is no list."""
    value, where = body.get(key), f"{where}.{key}" if where else key
    if value is None:
        return []
    if not isinstance(value, list):
        raise RequestError(f"{where} must be a list, not {shown(value)}", parameter=where)
    return [(item(each, f"{where}[{position}]"), f"{where}[{position}]") for position, each in enumerate(value)]


def content(body: dict[str, Any], key: str, where: str, separator: str = "") -> str:
    """Return a content as one string, which is empty if there is none.

    A list of parts is joined by `separator`. Raise RequestError if one is not text, such as an image.
    """
    value = body.get(key)
    if value is None or isinstance(value, str):
        return text(body, key, where) or ""
    return separator.join(part(each, name) for each, name in items(body, key, where))


def part(sent: dict[str, Any], where: str) -> str:
    """Return the text of one part of a content."""
    kind = sent.get("type")
    if not isinstance(kind, str) or kind not in TEXTS:
        raise RequestError(f"{where} is of type {shown(kind)}: the endpoint reads only text", parameter=where)
    return string(sent.get(TEXTS[kind]), f"{where}.{TEXTS[kind]}")


def stops(body: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the stop strings of the body: one string or a list of them."""
    value = body.get(key)
    if value is None:
        return ()
    found = tuple(string(each, key) for each in (value if isinstance(value, list) else [value]))
    if "" in found:
        raise RequestError(f"{key} must not have an empty string", parameter=key)
    return found


def settings(body: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `Request` that all protocols name alike. Raise RequestError for what NEUTRAL has."""
    refuse(body, NEUTRAL)
    return {
        "model": text(body, "model") or "",
        "temperature": number(body, "temperature", 0, 2),
        "top_p": number(body, "top_p", 1e-6, 1),
        "seed": whole(body, "seed", -(1 << 63), (1 << 63) - 1),
        "stream": flag(body, "stream"),
    }


def template_settings(body: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the chat template: `chat_template_kwargs`, which clients send as an extra parameter."""
    arguments = item(body.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    for key in ("messages", "conversation", "tools", "tokenize", "add_generation_prompt", "chat_template"):
        if key in arguments:
            raise RequestError(
                f"chat_template_kwargs.{key} is not supported: {RENDERED}; leave it out",
                parameter="chat_template_kwargs",
            )
    return {key: value for key, value in arguments.items() if value is not None}


MAX_TOKENS = 1 << 31
MAX_RESPONSES = 128
"""Limits of the integers in a request."""
