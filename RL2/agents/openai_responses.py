"""OpenAI's /v1/responses, as far as its client and the agents built on it need; nothing is kept between requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from RL2.agents import fields
from RL2.agents.calls import call, tool, wants_tools, written
from RL2.agents.openai_chat import error as error
from RL2.agents.openai_chat import logprobs, new_id, usage
from RL2.agents.protocol import Event, Reply, Request, RequestError
from RL2.data.chat import Message
from RL2.data.source import shown

STATELESS = "the endpoint keeps no responses; send the whole conversation in input"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((), STATELESS),
    "conversation": ((), STATELESS),
    "prompt": ((), STATELESS),
    "background": ((False,), STATELESS),
    "top_logprobs": ((0,), "the log-probability is kept of the sampled token only"),
}
"""Parameters of this protocol that are refused; see `fields.NEUTRAL`."""

ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
"""Roles of chat templates for those of the protocol."""


def read(body: dict[str, Any]) -> Request:
    """Return the request that the JSON object `body` makes. Raise RequestError if it is not one."""
    fields.refuse(body, NEUTRAL)
    written_as = fields.item(body.get("text") or {}, "text").get("format")
    fields.refuse({"text.format": written_as}, {"text.format": (({"type": "text"},), fields.FREE)})
    arguments = fields.template_settings(body)
    if effort := fields.text(fields.item(body.get("reasoning") or {}, "reasoning"), "effort", "reasoning"):
        arguments.setdefault("reasoning_effort", effort)
    tools = [_tool(each, where) for each, where in fields.items(body, "tools")]
    if tools and wants_tools(body.get("tool_choice")):
        arguments["tools"] = tools
    include = body.get("include") or []
    return Request(
        **fields.settings(body),
        messages=_messages(body),
        arguments=arguments,
        max_tokens=fields.whole(body, "max_output_tokens", 1, fields.MAX_TOKENS),
        stop=fields.stops(body, "stop"),
        logprobs=isinstance(include, list) and "message.output_text.logprobs" in include,
        parallel_calls=fields.flag(body, "parallel_tool_calls", True),
    )


def _tool(sent: dict[str, Any], where: str) -> dict[str, Any]:
    if sent.get("type") != "function":
        raise RequestError(f"{where} is of type {shown(sent.get('type'))}: only functions are tools", parameter="tools")
    return tool(sent.get("name"), sent.get("description"), sent.get("parameters"), where)


def _messages(body: dict[str, Any]) -> list[Message]:
    instructions = fields.text(body, "instructions")
    messages: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(body.get("input"), str):
        return [*messages, {"role": "user", "content": fields.string(body["input"], "input")}]
    sent = fields.items(body, "input")
    if not sent:
        raise RequestError("input must be a text or a list of at least one item", parameter="input")
    for item, where in sent:
        kind = item.get("type") or "message"
        if kind == "function_call_output":
            messages.append(_result(item, where))
        elif kind == "message" and item.get("role") != "assistant":
            messages.append(_message(item, where))
        elif kind in ("message", "reasoning", "function_call"):
            _add_to_answer(messages, kind, item, where)
        else:
            hint = f": {STATELESS}" if kind == "item_reference" else ""
            raise RequestError(f"{where} of type {shown(kind)} is not supported{hint}", parameter=where)
    return messages


def _message(item: dict[str, Any], where: str) -> Message:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(f"{where}.role={shown(role)} must be one of {', '.join(ROLES)}", parameter=where)
    return {"role": ROLES[role], "content": fields.content(item, "content", where)}


def _result(item: dict[str, Any], where: str) -> Message:
    message: Message = {"role": "tool", "content": fields.content(item, "output", where)}
    if call_id := fields.text(item, "call_id", where):
        message["tool_call_id"] = call_id
    return message


def _add_to_answer(messages: list[Message], kind: str, item: dict[str, Any], where: str) -> None:
    """Add an item of the assistant to its last message, or begin another one.

    The items of one answer are, in this order and each if there is any: reasoning, content, calls.
    """
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if kind == "function_call":
        arguments = item.get("arguments") or {}
        called = call(fields.text(item, "call_id", where), item.get("name"), arguments, where)
        if last is None:
            messages.append({"role": "assistant", "content": "", "tool_calls": [called]})
        else:
            last["tool_calls"] = [*last.get("tool_calls", []), called]
        return
    if kind == "reasoning":
        thoughts = fields.content(item, "content", where) or fields.content(item, "summary", where, "\n\n")
        messages.append({"role": "assistant", "content": "", **({"reasoning_content": thoughts} if thoughts else {})})
        return
    content = fields.content(item, "content", where)
    if last is not None and not last["content"] and not last.get("tool_calls"):
        last["content"] = content
    else:
        messages.append({"role": "assistant", "content": content})


def answer(request: Request, replies: list[Reply]) -> dict[str, Any]:
    """Return the JSON object that answers `request`."""
    (reply,) = replies
    return _ended(_head(request), reply, _output(request, reply))


def _head(request: Request) -> dict[str, Any]:
    """Return a response that has no output yet."""
    tools = [{"type": "function", "strict": False, **each["function"]} for each in request.arguments.get("tools", [])]
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": request.model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": request.parallel_calls,
        "tool_choice": "auto",
        "tools": tools,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_output_tokens": request.max_tokens,
        "previous_response_id": None,
        "store": False,
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "usage": None,
    }


def _ended(head: dict[str, Any], reply: Reply, output: list[dict[str, Any]]) -> dict[str, Any]:
    cut = reply.finish == "length"
    counted = usage([reply])
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": output,
        "usage": {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counted["total_tokens"],
        },
    }


def _output(request: Request, reply: Reply) -> list[dict[str, Any]]:
    """Return the items of an answer, at least one."""
    message, status = reply.message, "incomplete" if reply.finish == "length" else "completed"
    items: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        part = {"type": "reasoning_text", "text": message["reasoning_content"]}
        items.append({"type": "reasoning", "id": new_id("rs"), "summary": [], "content": [part], "status": status})
    calls = message.get("tool_calls") or []
    if message.get("content") or not calls:
        logps = logprobs(reply) if request.logprobs else []
        text = message.get("content") or ""
        parts = [{"type": "output_text", "text": text, "annotations": [], "logprobs": logps}]
        items.append({"type": "message", "id": new_id("msg"), "role": "assistant", "status": status, "content": parts})
    for called in calls:
        function = called["function"]
        head = {"type": "function_call", "id": new_id("fc"), "call_id": called["id"], "status": status}
        items.append({**head, "name": function["name"], "arguments": written(function["arguments"])})
    return items


def events(request: Request, replies: list[Reply]) -> Iterator[Event]:
    """Return the server-sent events that answer `request` when it asks for a stream."""
    for number, data in enumerate(_events(request, replies)):
        yield data["type"], {**data, "sequence_number": number}


def _events(request: Request, replies: list[Reply]) -> Iterator[dict[str, Any]]:
    (reply,) = replies
    head, output = _head(request), _output(request, reply)
    yield {"type": "response.created", "response": head}
    yield {"type": "response.in_progress", "response": head}
    for number, item in enumerate(output):
        is_call = item["type"] == "function_call"
        empty: dict[str, Any] = {"arguments": ""} if is_call else {"content": []}
        opened = {**item, "status": "in_progress", **empty}
        yield {"type": "response.output_item.added", "output_index": number, "item": opened}
        place = {"item_id": item["id"], "output_index": number}
        for event in _call_events(item) if is_call else _part_events(item["content"][0]):
            yield {**event, **place}
        yield {"type": "response.output_item.done", "output_index": number, "item": item}
    response = _ended(head, reply, output)
    yield {"type": f"response.{response['status']}", "response": response}


def _call_events(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"type": "response.function_call_arguments.delta", "delta": item["arguments"]}
    yield {
        "type": "response.function_call_arguments.done",
        "name": item["name"],
        "arguments": item["arguments"],
    }


def _part_events(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a text, of the answer or of the reasoning."""
    at, name, text = {"content_index": 0}, f"response.{part['type']}", part["text"]
    more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
    emptied = {**part, "text": "", **({"logprobs": []} if more else {})}
    yield {"type": "response.content_part.added", **at, "part": emptied}
    yield {"type": f"{name}.delta", **at, "delta": text, **more}
    yield {"type": f"{name}.done", **at, "text": text, **more}
    yield {"type": "response.content_part.done", **at, "part": part}
