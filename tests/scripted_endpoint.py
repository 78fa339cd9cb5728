"""A server that answers in the protocols of the endpoint with replies that a test gives it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from RL2.agents.protocol import Protocol, Reply, Request, RequestError
from RL2.data.chat import Message


@dataclass
class Scripted:
    """A server on a loopback port, what it is to answer next and what it was asked."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)


@contextmanager
def serving(protocols: dict[str, Protocol]) -> Iterator[Scripted]:
    """Serve each protocol under its path."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        scripted = Scripted(f"http://127.0.0.1:{listening.getsockname()[1]}")
        routes = [Route(path, endpoint(scripted, protocol), methods=["POST"]) for path, protocol in protocols.items()]
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield scripted
        finally:
            server.should_exit = True
            thread.join()


def endpoint(scripted: Scripted, protocol: Protocol) -> Any:
    async def serve(http: HttpRequest) -> Response:
        try:
            request = protocol.read(await http.json())
        except RequestError as error:
            return JSONResponse(protocol.error(error), status_code=error.status)
        scripted.requests.append(request)
        if request.stream:
            lines = (server_sent(*event) for event in protocol.events(request, scripted.replies))
            return StreamingResponse(lines, media_type="text/event-stream")
        return JSONResponse(protocol.answer(request, scripted.replies))

    return serve


def server_sent(name: str | None, data: dict[str, Any] | str) -> str:
    return (f"event: {name}\n" if name else "") + f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def reply(message: Message, *, finish: Any = None, stop: str | None = None, prompt_tokens: int = 7) -> Reply:
    """A reply whose tokens are made up: three characters each, and an end token."""
    text = f"{message.get('reasoning_content', '')}{message['content'] or ''}{message.get('tool_calls', '')}"
    texts = [text[at : at + 3] for at in range(0, len(text), 3)] + ["<end>"]
    return Reply(
        message={"role": "assistant", **message},
        token_ids=list(range(len(texts))),
        token_texts=texts,
        logps=[-0.5 * position for position in range(len(texts))],
        finish=finish or ("tool_calls" if message.get("tool_calls") else "stop"),
        stop=stop,
        prompt_tokens=prompt_tokens,
    )


def called(arguments: Any, call_id: str = "call_1", name: str = "add") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


ASK: Message = {"role": "user", "content": "1 + 2"}
MESSAGE: Message = {
    "role": "assistant",
    "content": "Sum:",
    "reasoning_content": "Add them.",
    "tool_calls": [called({"a": 1}), called('{"a": ', "call_2")],
}
"""An answer with everything in it; the arguments of the second call are no JSON."""

TEXTS = (
    "",
    " ",
    "\n\n",
    "plain",
    " spaces around ",
    "line\r\nline\u2028line\x85line",
    "data: x\n\nevent: y\n\n",
    "\x00\x1b[0m\x7f",
    "e\u0301 \u202eabc\ufeff \U0001f468\u200d\U0001f469\u200d\U0001f467",
    '"\\u0041\\" {"a": 1}',
    "<think>x</think> <tool_call>{}</tool_call>",
    "\u4e2d\u6587\ufffd",
)
"""Texts that break careless readers."""

RAW = ('{"a": ', "not JSON", "[1, 2]", "null", '"text"', "{'a': 1}")
"""Arguments that are not an object."""


def random_message(random: Random, number: int) -> Message:
    """A message of the assistant: content, reasoning and calls in any combination."""
    message: Message = {"role": "assistant", "content": random_text(random)}
    if random.random() < 0.4 and (reasoning := random_text(random).strip()):
        message["reasoning_content"] = reasoning
    if count := random.choice((0, 0, 1, 1, 3)):
        message["tool_calls"] = [
            called(random_arguments(random), f"call_{number}_{position}", random.choice(("add", "find-it", "x_y", "")))
            for position in range(count)
        ]
    return message


def random_text(random: Random) -> str:
    return "".join(random.choices(TEXTS, k=random.choice((0, 1, 1, 3))))


def random_arguments(random: Random) -> Any:
    return (
        random.choice(RAW) if random.random() < 0.2 else {key: random_value(random, 3) for key in random_keys(random)}
    )


def random_keys(random: Random) -> list[str]:
    return random.sample(["a", "", "\u4e2d", "b c", "INVALID_JSON", "\u2028"], k=random.randrange(4))


def random_value(random: Random, depth: int) -> Any:
    scalars = (None, True, False, 0, -7, 1.5, 1e300, 2**53 + 1, "\ud800", float("inf"), random_text(random))
    kind = random.randrange(4) if depth else 0
    if kind == 1:
        return [random_value(random, depth - 1) for _ in range(random.randrange(3))]
    if kind == 2:
        return {key: random_value(random, depth - 1) for key in random_keys(random)}
    return random.choice(scalars)
