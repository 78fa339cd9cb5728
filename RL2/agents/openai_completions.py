"""OpenAI's /v1/completions: a text or token ids that go on, without a chat template."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from RL2.agents import fields
from RL2.agents.openai_chat import error as error
from RL2.agents.openai_chat import new_id, stream_usage, usage
from RL2.agents.protocol import Event, Reply, Request, RequestError
from RL2.data.source import shown

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "logprobs": ((0, False), "the log-probability is kept of the sampled token only, which logprobs=0 returns"),
    "suffix": (("",), "texts are continued at their end"),
}
"""Parameters of this protocol that are refused; see `fields.NEUTRAL`."""


def read(body: dict[str, Any]) -> Request:
    """Return the request that the JSON object `body` makes. Raise RequestError if it is not one."""
    fields.refuse(body, NEUTRAL)
    n = fields.whole(body, "n", 1, fields.MAX_RESPONSES) or 1
    fields.refuse(body, {"best_of": ((n,), "all n responses are returned")})
    return Request(
        **fields.settings(body),
        prompt=_prompt(body.get("prompt")),
        n=n,
        max_tokens=fields.whole(body, "max_tokens", 1, fields.MAX_TOKENS),
        stop=fields.stops(body, "stop"),
        logprobs=isinstance(body.get("logprobs"), int) and body["logprobs"] is not False,
        stream_usage=stream_usage(body),
    )


def _prompt(prompt: Any) -> str | list[int]:
    """Return the text or the token ids to continue; a list of one prompt is that prompt."""
    if isinstance(prompt, list) and prompt and not _are_ids(prompt):
        if len(prompt) > 1:
            raise RequestError(
                f"prompt is a list of {len(prompt)} prompts: send one request for each", parameter="prompt"
            )
        (prompt,) = prompt
    if isinstance(prompt, str) and prompt:
        return fields.string(prompt, "prompt")
    if isinstance(prompt, list) and prompt and _are_ids(prompt):
        return prompt
    raise RequestError(f"prompt must be a text or a list of token ids, not {shown(prompt)}", parameter="prompt")


def _are_ids(prompt: list[Any]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in prompt)


def answer(request: Request, replies: list[Reply]) -> dict[str, Any]:
    """Return the JSON object that answers `request`."""
    choices = [_choice(number, reply, request) for number, reply in enumerate(replies)]
    return {**_head(request), "choices": choices, "usage": usage(replies)}


def _head(request: Request) -> dict[str, Any]:
    return {"id": new_id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": request.model}


def _choice(number: int, reply: Reply, request: Request) -> dict[str, Any]:
    return {
        "index": number,
        "text": reply.message.get("content") or "",
        "logprobs": _logprobs(reply) if request.logprobs else None,
        "finish_reason": "length" if reply.finish == "length" else "stop",
    }


def _logprobs(reply: Reply) -> dict[str, Any]:
    ends = list(accumulate(map(len, reply.token_texts), initial=0))
    return {
        "tokens": reply.token_texts,
        "token_logprobs": reply.logps,
        "top_logprobs": None,
        "text_offset": ends[:-1],
    }


def events(request: Request, replies: list[Reply]) -> Iterator[Event]:
    """Return the server-sent events that answer `request` when it asks for a stream."""
    head = _head(request)
    if request.stream_usage:
        head["usage"] = None
    for number, reply in enumerate(replies):
        choice = _choice(number, reply, request)
        yield None, {**head, "choices": [{**choice, "finish_reason": None}]}
        yield None, {**head, "choices": [{**choice, "text": "", "logprobs": None}]}
    if request.stream_usage:
        yield None, {**head, "choices": [], "usage": usage(replies)}
    yield None, "[DONE]"
