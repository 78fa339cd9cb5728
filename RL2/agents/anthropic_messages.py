"""Anthropic's /v1/messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from RL2.agents import fields
from RL2.agents.calls import call, tool, unwrapped, wants_tools, wrapped, written
from RL2.agents.protocol import Event, Reply, Request, RequestError
from RL2.data.chat import Message
from RL2.data.source import shown

SERVER = "there are no servers, tools or files behind the endpoint"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "container": ((), SERVER),
    "mcp_servers": (([],), SERVER),
}
"""Parameters of this protocol that are refused; see `fields.NEUTRAL`."""

BLOCKS = "\n"
"""Separator of the text blocks of one message."""

BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")
"""First line that some programs write into the system prompt for Anthropic's bill.

It differs in each request, so that none would continue another.
"""

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

ERRORS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Types of errors by HTTP status; others are those of the client below 500, and of the server from there on."""


def read(body: dict[str, Any]) -> Request:
    """Return the request that the JSON object `body` makes. Raise RequestError if it is not one."""
    max_tokens = fields.whole(body, "max_tokens", 1, fields.MAX_TOKENS)
    if max_tokens is None:
        raise RequestError("max_tokens must be given", parameter="max_tokens")
    return _request(body, max_tokens)


def read_count(body: dict[str, Any]) -> Request:
    """Return the request whose prompt is to be counted (/v1/messages/count_tokens)."""
    return _request(body, None)


def _request(body: dict[str, Any], max_tokens: int | None) -> Request:
    fields.refuse(body, NEUTRAL)
    output = fields.item(body.get("output_config") or {}, "output_config")
    fields.refuse(output, {"format": ((), fields.FREE)})
    choice = fields.item(body.get("tool_choice") or {}, "tool_choice")
    arguments = fields.template_settings(body)
    if effort := fields.text(output, "effort", "output_config"):
        arguments.setdefault("reasoning_effort", effort)
    tools = [_tool(each, where) for each, where in fields.items(body, "tools")]
    if tools and wants_tools(choice or None):
        arguments["tools"] = tools
    return Request(
        **fields.settings(body),
        messages=_messages(body),
        arguments=arguments,
        max_tokens=max_tokens,
        stop=fields.stops(body, "stop_sequences"),
        parallel_calls=not fields.flag(choice, "disable_parallel_tool_use"),
    )


def _messages(body: dict[str, Any]) -> list[Message]:
    """Return the conversation. A message with results of tools becomes several."""
    system = fields.content(body, "system", "", BLOCKS)
    if header := BILLING.match(system):
        system = system[header.end() :]
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    sent = fields.items(body, "messages")
    if not sent:
        raise RequestError("messages must be a list of at least one message", parameter="messages")
    for message, where in sent:
        role = message.get("role")
        if role == "assistant":
            messages.append(_assistant(message, where))
        elif role == "user":
            messages += _user(message, where)
        elif role == "system":
            messages.append({"role": "system", "content": fields.content(message, "content", where, BLOCKS)})
        else:
            raise RequestError(f"{where}.role={shown(role)} must be user or assistant", parameter=where)
    if messages[-1]["role"] == "assistant":
        raise RequestError(
            "messages end with the assistant, whose text is not continued: send a message of the user last",
            parameter="messages",
        )
    return messages


def _user(message: dict[str, Any], where: str) -> list[Message]:
    """Return the results of tools and the texts of a message, in its order."""
    found: list[Message] = []
    texts: list[str] = []
    for block, name in _blocks(message, where):
        if block.get("type") == "tool_result":
            found += _joined(texts)
            texts = []
            result: Message = {"role": "tool", "content": fields.content(block, "content", name, BLOCKS)}
            if call_id := fields.text(block, "tool_use_id", name):
                result["tool_call_id"] = call_id
            found.append(result)
        else:
            texts.append(fields.part(block, name))
    return found + (_joined(texts) or ([] if found else [{"role": "user", "content": ""}]))


def _joined(texts: list[str]) -> list[Message]:
    return [{"role": "user", "content": BLOCKS.join(texts)}] if texts else []


def _assistant(message: dict[str, Any], where: str) -> Message:
    texts, thoughts, calls = [], [], []
    for block, name in _blocks(message, where):
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(fields.text(block, "thinking", name) or "")
        elif kind == "tool_use":
            arguments = unwrapped(fields.item(block.get("input") or {}, f"{name}.input"))
            calls.append(call(fields.text(block, "id", name), block.get("name"), arguments, name))
        elif kind != "redacted_thinking":
            texts.append(fields.part(block, name))
    read: Message = {"role": "assistant", "content": BLOCKS.join(texts)}
    if any(thoughts):
        read["reasoning_content"] = BLOCKS.join(thoughts)
    if calls:
        read["tool_calls"] = calls
    return read


def _blocks(message: dict[str, Any], where: str) -> list[tuple[dict[str, Any], str]]:
    """Return the blocks of a content, each with its name for errors; a string is one text block."""
    content = message.get("content")
    if isinstance(content, str):
        return [({"type": "text", "text": content}, f"{where}.content")]
    return fields.items(message, "content", where)


def _tool(sent: dict[str, Any], where: str) -> dict[str, Any]:
    if sent.get("type") not in (None, "custom"):
        raise RequestError(f"{where} is of type {shown(sent['type'])}: {SERVER}", parameter="tools")
    return tool(sent.get("name"), sent.get("description"), sent.get("input_schema"), where)


def answer(request: Request, replies: list[Reply]) -> dict[str, Any]:
    """Return the JSON object that answers `request`."""
    (reply,) = replies
    return {**_head(request), "content": _content(reply.message), **_end(reply), "usage": _usage(reply)}


def _head(request: Request) -> dict[str, Any]:
    return {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": request.model}


def _end(reply: Reply) -> dict[str, Any]:
    reason = "stop_sequence" if reply.stop is not None else STOP_REASONS[reply.finish]
    return {"stop_reason": reason, "stop_sequence": reply.stop}


def _usage(reply: Reply) -> dict[str, Any]:
    return {"input_tokens": reply.prompt_tokens, "output_tokens": len(reply.token_ids)}


def _content(message: Message) -> list[dict[str, Any]]:
    """Return the blocks of an answer, at least one."""
    blocks: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": ""})
    calls = message.get("tool_calls") or []
    if message.get("content") or not calls:
        blocks.append({"type": "text", "text": message.get("content") or ""})
    for called in calls:
        function = called["function"]
        arguments = wrapped(function["arguments"])
        blocks.append({"type": "tool_use", "id": called["id"], "name": function["name"], "input": arguments})
    return blocks


def events(request: Request, replies: list[Reply]) -> Iterator[Event]:
    """Return the server-sent events that answer `request` when it asks for a stream."""
    for data in _events(request, replies):
        yield data["type"], data


def _events(request: Request, replies: list[Reply]) -> Iterator[dict[str, Any]]:
    (reply,) = replies
    begin = {**_head(request), "content": [], "stop_reason": None, "stop_sequence": None}
    yield {"type": "message_start", "message": {**begin, "usage": {**_usage(reply), "output_tokens": 0}}}
    for number, block in enumerate(_content(reply.message)):
        opened, deltas = _opened(block)
        yield {"type": "content_block_start", "index": number, "content_block": opened}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": number, "delta": delta}
        yield {"type": "content_block_stop", "index": number}
    yield {"type": "message_delta", "delta": _end(reply), "usage": _usage(reply)}
    yield {"type": "message_stop"}


def _opened(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block as it begins, and the deltas that complete it."""
    if block["type"] == "tool_use":
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": written(block["input"])}]
    if block["type"] == "thinking":
        thought = {"type": "thinking_delta", "thinking": block["thinking"]}
        return {**block, "thinking": ""}, [thought, {"type": "signature_delta", "signature": block["signature"]}]
    return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]


def error(error: RequestError) -> dict[str, Any]:
    """Return the JSON object of an error."""
    kind = ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}
