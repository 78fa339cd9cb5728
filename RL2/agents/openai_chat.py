"""OpenAI's /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from RL2.agents import fields
from RL2.agents.calls import call, tool, wants_tools, written
from RL2.agents.protocol import Event, Reply, Request, RequestError
from RL2.data.chat import Message
from RL2.data.source import shown

NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "functions are passed in tools"),
    "function_call": (("none", "auto"), "functions are passed in tools"),
    "response_format": (({"type": "text"},), fields.FREE),
    "top_logprobs": ((0,), "the log-probability is kept of the sampled token only"),
    "modalities": ((["text"],), "answers are text"),
    "audio": ((), "answers are text"),
    "web_search_options": ((), "there is no search; pass a tool"),
}
"""Parameters of this protocol that are refused; see `fields.NEUTRAL`."""

ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of chat templates for those of the protocol."""


def read(body: dict[str, Any]) -> Request:
    """Return the request that the JSON object `body` makes. Raise RequestError if it is not one."""
    fields.refuse(body, NEUTRAL)
    messages = [_message(message, where) for message, where in fields.items(body, "messages")]
    if not messages:
        raise RequestError("messages must be a list of at least one message", parameter="messages")
    arguments = fields.template_settings(body)
    if effort := fields.text(body, "reasoning_effort"):
        arguments.setdefault("reasoning_effort", effort)
    tools = [_tool(each, where) for each, where in fields.items(body, "tools")]
    if tools and wants_tools(body.get("tool_choice")):
        arguments["tools"] = tools
    return Request(
        **fields.settings(body),
        messages=messages,
        arguments=arguments,
        n=fields.whole(body, "n", 1, fields.MAX_RESPONSES) or 1,
        max_tokens=fields.whole(body, "max_completion_tokens", 1, fields.MAX_TOKENS)
        or fields.whole(body, "max_tokens", 1, fields.MAX_TOKENS),
        stop=fields.stops(body, "stop"),
        logprobs=fields.flag(body, "logprobs"),
        stream_usage=stream_usage(body),
        parallel_calls=fields.flag(body, "parallel_tool_calls", True),
    )


def stream_usage(body: dict[str, Any]) -> bool:
    """Return whether the client wants the numbers of tokens at the end of a stream."""
    return fields.flag(fields.item(body.get("stream_options") or {}, "stream_options"), "include_usage")


def _message(sent: dict[str, Any], where: str) -> Message:
    role = sent.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}.role={shown(role)} must be one of {', '.join(ROLES)}", parameter=where)
    if sent.get("function_call") is not None:
        raise RequestError(f"{where}.function_call is not supported: calls are passed in tool_calls", parameter=where)
    message: Message = {"role": ROLES[role], "content": fields.content(sent, "content", where)}
    if name := fields.text(sent, "name", where):
        message["name"] = name
    if role == "tool" and (call_id := fields.text(sent, "tool_call_id", where)):
        message["tool_call_id"] = call_id
    if role == "assistant":
        # servers name it one way or the other
        if reasoning := fields.text(sent, "reasoning_content", where) or fields.text(sent, "reasoning", where):
            message["reasoning_content"] = reasoning
        if calls := [_call(each, name) for each, name in fields.items(sent, "tool_calls", where)]:
            message["tool_calls"] = calls
    return message


def _call(sent: dict[str, Any], where: str) -> dict[str, Any]:
    if sent.get("type") not in (None, "function"):
        raise RequestError(f"{where} is of type {shown(sent['type'])}: only functions are tools", parameter=where)
    function = fields.item(sent.get("function"), f"{where}.function")
    return call(fields.text(sent, "id", where), function.get("name"), function.get("arguments") or {}, where)


def _tool(sent: dict[str, Any], where: str) -> dict[str, Any]:
    if sent.get("type") != "function":
        raise RequestError(f"{where} is of type {shown(sent.get('type'))}: only functions are tools", parameter="tools")
    function = fields.item(sent.get("function"), f"{where}.function")
    return tool(function.get("name"), function.get("description"), function.get("parameters"), where)


def answer(request: Request, replies: list[Reply]) -> dict[str, Any]:
    """Return the JSON object that answers `request`."""
    choices = [_choice(number, reply, request.logprobs) for number, reply in enumerate(replies)]
    return {**_head(request, "chat.completion"), "choices": choices, "usage": usage(replies)}


def _head(request: Request, kind: str) -> dict[str, Any]:
    return {"id": new_id("chatcmpl"), "object": kind, "created": int(time.time()), "model": request.model}


def new_id(prefix: str) -> str:
    """Return a name that nothing else has."""
    return f"{prefix}-{uuid4().hex}"


def _choice(number: int, reply: Reply, wants_logprobs: bool) -> dict[str, Any]:
    message = reply.message
    written_message: dict[str, Any] = {"role": "assistant", "content": content(message), "refusal": None}
    if message.get("reasoning_content"):
        written_message["reasoning_content"] = message["reasoning_content"]
    if message.get("tool_calls"):
        written_message["tool_calls"] = [_written_call(each) for each in message["tool_calls"]]
    return {
        "index": number,
        "message": written_message,
        "logprobs": {"content": logprobs(reply), "refusal": None} if wants_logprobs else None,
        "finish_reason": reply.finish,
    }


def content(message: Message) -> str | None:
    """Return the content of an answer: null if there are only calls."""
    return message.get("content") or (None if message.get("tool_calls") else "")


def _written_call(called: dict[str, Any]) -> dict[str, Any]:
    function = called["function"]
    arguments = written(function["arguments"])
    return {"id": called["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def logprobs(reply: Reply) -> list[dict[str, Any]]:
    """Return the log-probability of each sampled token, those of reasoning and calls included."""
    return [
        {"token": text, "bytes": list(text.encode()), "logprob": logp, "top_logprobs": []}
        for text, logp in zip(reply.token_texts, reply.logps, strict=True)
    ]


def usage(replies: list[Reply]) -> dict[str, Any]:
    """Return the numbers of tokens; the prompt counts once."""
    prompt, sampled = replies[0].prompt_tokens, sum(len(reply.token_ids) for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def events(request: Request, replies: list[Reply]) -> Iterator[Event]:
    """Return the server-sent events that answer `request` when it asks for a stream."""
    head = _head(request, "chat.completion.chunk")
    if request.stream_usage:
        head["usage"] = None
    for number, reply in enumerate(replies):
        wanted = {"content": logprobs(reply), "refusal": None} if request.logprobs else None
        deltas = [*_deltas(reply.message), {}]
        # the log-probabilities come with the content, or else at the end
        carrier = next((at for at, delta in enumerate(deltas) if delta.get("content")), len(deltas) - 1)
        for at, delta in enumerate(deltas):
            choice = {
                "index": number,
                "delta": delta,
                "logprobs": wanted if at == carrier else None,
                "finish_reason": reply.finish if at == len(deltas) - 1 else None,
            }
            yield None, {**head, "choices": [choice]}
    if request.stream_usage:
        yield None, {**head, "choices": [], "usage": usage(replies)}
    yield None, "[DONE]"


def _deltas(message: Message) -> Iterator[dict[str, Any]]:
    """Yield the parts of a message that a client puts together."""
    yield {"role": "assistant", "content": None if content(message) is None else ""}
    if message.get("reasoning_content"):
        yield {"reasoning_content": message["reasoning_content"]}
    if message.get("content"):
        yield {"content": message["content"]}
    for number, called in enumerate(message.get("tool_calls") or []):
        whole = _written_call(called)
        arguments = whole["function"]["arguments"]
        yield {"tool_calls": [{"index": number, **whole, "function": {**whole["function"], "arguments": ""}}]}
        yield {"tool_calls": [{"index": number, "function": {"arguments": arguments}}]}


def error(error: RequestError) -> dict[str, Any]:
    """Return the JSON object of an error."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.parameter, "code": None}}
