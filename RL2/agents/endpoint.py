"""The HTTP endpoint that agents know as the API of a model, on loopback; each key opens one session.

It runs in the event loop of the rollouts, beside the engine. OpenAI's chat, completions and responses APIs and
Anthropic's messages API are served. A response is sampled as a whole and then sent, also to clients that want a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from RL2.agents import anthropic_messages, openai_chat, openai_completions, openai_responses
from RL2.agents.protocol import Protocol, Reply, RequestError
from RL2.agents.protocol import Request as ModelRequest
from RL2.agents.session import Session

T = TypeVar("T")
Answer = Callable[[Request, Session], Coroutine[Any, Any, Response]]
"""Function that answers a request in the session that its key opens."""
MAX_BODY = 32 << 20
"""Limit of a request in bytes."""
BODY_S = 30.0
"""Limit for a client to send its request, in seconds."""
CLOSE_S = 5
"""Limit for open connections at shutdown, in seconds."""
BACKLOG = 2048
HOST = "127.0.0.1"
PROTOCOLS: dict[str, Protocol] = {
    "/v1/chat/completions": openai_chat,
    "/v1/completions": openai_completions,
    "/v1/responses": openai_responses,
    "/v1/messages": anthropic_messages,
}
MODEL = "policy"
"""Name of the model in the list of models; requests may use any name."""


class Endpoint:
    """A server on a free port of 127.0.0.1. Create and close it in the event loop in which it runs."""

    def __init__(self, port: int = 0, body_s: float = BODY_S) -> None:
        """Open a port, by default a free one; `start` answers requests. A client has `body_s` to send one."""
        self.sessions: dict[str, Callable[[], Session]] = {}
        """Key -> function that returns the session of a request."""
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind((HOST, port))
        self.url = f"http://{HOST}:{self.socket.getsockname()[1]}"
        self.body_s = body_s
        routes = [
            *(
                Route(path, self._route(protocol, partial(self._respond, protocol)), methods=["POST"])
                for path, protocol in PROTOCOLS.items()
            ),
            Route("/v1/messages/count_tokens", self._route(anthropic_messages, self._count), methods=["POST"]),
            Route("/v1/models", self._route(openai_chat, _models)),
            Route("/v1/models/{name:path}", self._route(openai_chat, _models)),
            Route("/health", _healthy),
        ]
        app = Starlette(routes=routes, exception_handlers={404: _not_found, 405: _not_found})
        self._server = _Server(
            uvicorn.Config(
                app,
                log_level="critical",
                access_log=False,
                lifespan="off",
                backlog=BACKLOG,
                timeout_graceful_shutdown=CLOSE_S,
                ws="none",
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answer requests from now on."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self.socket]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise RuntimeError("the endpoint for agents has ended while it started")
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        """Close all connections and the port; may be called again."""
        if self._serving is not None:
            self._server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving
            self._serving = None
        self.socket.close()

    @contextlib.contextmanager
    def serving(self, key: str, session: Session) -> Iterator[None]:
        """Answer requests with `key` from `session` in the `with` block."""
        self.sessions[key] = lambda: session
        try:
            yield
        finally:
            session.is_over = True
            del self.sessions[key]

    def _session(self, request: Request) -> Session:
        """Return the session of a request. Raise RequestError if its key opens none."""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        key = request.headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        if key not in self.sessions:
            raise RequestError("the API key is missing, wrong, or that of an episode that has ended", 401)
        return self.sessions[key]()

    def _route(self, protocol: Protocol, answer: Answer) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers requests of a key by `answer`, and writes errors as `protocol` does."""

        async def route(request: Request) -> Response:
            try:
                return await answer(request, self._session(request))
            except RequestError as error:
                return JSONResponse(protocol.error(error), status_code=error.status)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                failed = RequestError(f"the engine failed: {type(error).__name__}", 500)
                return JSONResponse(protocol.error(failed), status_code=500)

        return route

    async def _respond(self, protocol: Protocol, request: Request, session: Session) -> Response:
        asked = protocol.read(await _body(request, self.body_s))
        replies = await _unless_gone(request, session.respond(asked))
        if asked.stream:
            return StreamingResponse(_stream(protocol, asked, replies), media_type="text/event-stream")
        return JSONResponse(protocol.answer(asked, replies))

    async def _count(self, request: Request, session: Session) -> Response:
        asked = anthropic_messages.read_count(await _body(request, self.body_s))
        return JSONResponse({"input_tokens": session.count(asked)})


async def _models(request: Request, session: Session) -> Response:
    model = {"id": request.path_params.get("name", MODEL), "object": "model", "created": 0, "owned_by": "rl2"}
    return JSONResponse(model if "name" in request.path_params else {"object": "list", "data": [model]})


class _Server(uvicorn.Server):
    """A server that leaves signals to the run."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _body(request: Request, limit_s: float) -> dict[str, Any]:
    """Return the JSON object that a client sends. Raise RequestError if it sends another thing, or none in time."""
    data = bytearray()
    try:
        async with asyncio.timeout(limit_s):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise RequestError(f"the request has more than {MAX_BODY} bytes", 413)
    except TimeoutError as error:
        raise RequestError(f"the request did not arrive within {limit_s:g} s", 408) from error
    try:
        body = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the request is not a JSON object")
    return body


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. Cancel it and raise ClientDisconnect if the client leaves before."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(protocol: Protocol, request: ModelRequest, replies: list[Reply]) -> AsyncIterator[str]:
    for name, data in protocol.events(request, replies):
        event = "" if name is None else f"event: {name}\n"
        yield f"{event}data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


async def _healthy(request: Request) -> Response:
    return Response()


async def _not_found(request: Request, error: Exception) -> Response:
    known = ", ".join(PROTOCOLS)
    return JSONResponse(
        openai_chat.error(RequestError(f"{request.method} {request.url.path} is not served; POST to {known}", 404)), 404
    )
