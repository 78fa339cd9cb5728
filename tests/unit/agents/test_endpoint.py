"""The endpoint over real connections: keys, limits, clients that leave, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerBase

from RL2.agents.endpoint import Endpoint
from RL2.agents.session import Policy, Session
from RL2.data.template import Template
from RL2.data.tool_calls import ResponseParser
from RL2.engines.scripted import ScriptedEngine
from RL2.types import Completion, Sampling

KEY = {"authorization": "Bearer right"}
CHAT = {"model": "any", "messages": [{"role": "user", "content": "hello"}]}
Opened = Callable[..., Any]
Served = tuple[Endpoint, Session]
WRONG: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": "Basic right"},
    {"x-api-key": "r"},
]


class Paused(ScriptedEngine):
    """An engine that answers once a test lets it."""

    def __init__(self, reply: Any) -> None:
        super().__init__(reply)
        self.begun, self.may_end, self.cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        self.begun.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await super().generate(token_ids, sampling)


@pytest.fixture
def opened(tokenizer: PreTrainedTokenizerBase) -> Opened:
    """An endpoint with one session, whose engine always says the same."""

    def reply(token_ids: list[int], sampling: Sampling) -> list[int]:
        return [*tokenizer.encode("one two three"), int(tokenizer.eos_token_id)]

    @asynccontextmanager
    async def open_(engine: type[ScriptedEngine] = ScriptedEngine, **how: Any) -> AsyncIterator[Served]:
        template = Template(tokenizer)
        policy = Policy(engine(reply), tokenizer, template, ResponseParser(template), None)
        session = Session(policy, Sampling(max_new_tokens=64, stop_token_ids=(int(tokenizer.eos_token_id),)), 1)
        endpoint = Endpoint(**how)
        await endpoint.start()
        with endpoint.serving("right", session):
            try:
                yield endpoint, session
            finally:
                await endpoint.close()

    return open_


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@pytest.mark.parametrize("headers", WRONG, ids=["none", "wrong", "scheme", "half"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
def test_a_wrong_key_opens_nothing(opened: Opened, path: str, headers: dict[str, str]) -> None:
    async def work() -> None:
        async with opened() as (endpoint, session), httpx.AsyncClient(base_url=endpoint.url) as client:
            answer = await client.post(path, json=CHAT, headers=headers)
            assert answer.status_code == 401 and "key" in answer.json()["error"]["message"]
            assert not session.record.turns

    run(work())


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"x" * (33 << 20), 413, "more than 33554432 bytes"),
        (b"{", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"{}", 400, "messages"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "unicode|Unicode|surrogate"),
    ],
    ids=["large", "half", "list", "deep", "empty", "surrogate"],
)
def test_a_request_that_cannot_be_read_is_refused(opened: Opened, body: bytes, status: int, message: str) -> None:
    async def work() -> None:
        async with opened() as (endpoint, _), httpx.AsyncClient(base_url=endpoint.url) as client:
            answer = await client.post("/v1/chat/completions", content=body, headers=KEY)
            assert answer.status_code == status
            assert any(each in answer.json()["error"]["message"] for each in message.split("|"))
            assert (await client.post("/v1/chat/completions", json=CHAT, headers=KEY)).status_code == 200

    run(work())


def test_other_paths_are_named(opened: Opened) -> None:
    async def work() -> None:
        async with opened() as (endpoint, _), httpx.AsyncClient(base_url=endpoint.url) as client:
            for method, path in (("POST", "/v1/embeddings"), ("GET", "/v1/chat/completions")):
                answer = await client.request(method, path, headers=KEY)
                assert answer.status_code == 404
                assert f"{method} {path} is not served" in answer.json()["error"]["message"]
            assert [m["id"] for m in (await client.get("/v1/models", headers=KEY)).json()["data"]] == ["policy"]

    run(work())


def test_tokens_are_counted(opened: Opened) -> None:
    async def work() -> None:
        async with opened() as (endpoint, session), httpx.AsyncClient(base_url=endpoint.url) as client:
            count = (await client.post("/v1/messages/count_tokens", json=CHAT, headers=KEY)).json()
            used = (await client.post("/v1/messages", json=CHAT | {"max_tokens": 64}, headers=KEY)).json()["usage"]
            assert count == {"input_tokens": used["input_tokens"]} and len(session.record.turns) == 1
            assert (await client.post("/v1/messages/count_tokens", json={}, headers=KEY)).status_code == 400

    run(work())


def test_a_slow_client_does_not_hold_the_others_up(opened: Opened) -> None:
    async def work() -> None:
        async with opened(body_s=0.5) as (endpoint, _), httpx.AsyncClient(base_url=endpoint.url) as client:
            reader, writer = await asyncio.open_connection(*address(endpoint))
            head = (
                "POST /v1/chat/completions HTTP/1.1",
                "Host: x",
                "Authorization: Bearer right",
                "Content-Length: 99",
            )
            writer.write("\r\n".join([*head, "", "{"]).encode())
            await writer.drain()
            assert (await client.post("/v1/chat/completions", json=CHAT, headers=KEY)).status_code == 200
            assert b"408" in await reader.readline()
            writer.close()

    run(work())


def test_a_client_that_leaves_is_not_answered(opened: Opened) -> None:
    async def work() -> None:
        async with opened(Paused) as (endpoint, session):
            engine = session.policy.engine
            async with httpx.AsyncClient(base_url=endpoint.url) as client:
                asked = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=KEY))
                await engine.begun.wait()
                asked.cancel()
            await engine.cancelled.wait()
            assert not session.record.turns and session.failure is None
            engine.may_end.set()
            async with httpx.AsyncClient(base_url=endpoint.url) as client:
                assert (await client.post("/v1/chat/completions", json=CHAT, headers=KEY)).status_code == 200

    run(work())


def test_a_response_after_the_end_of_the_episode_is_not_recorded(opened: Opened) -> None:
    async def work() -> None:
        async with opened(Paused) as (endpoint, session), httpx.AsyncClient(base_url=endpoint.url) as client:
            with endpoint.serving("other", session):
                headers = {"authorization": "Bearer other"}
                asked = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT, headers=headers))
                await session.policy.engine.begun.wait()
            session.policy.engine.may_end.set()
            assert (await asked).status_code == 401
            assert not session.record.turns and session.failure is None

    run(work())


def test_a_client_may_leave_in_mid_stream(opened: Opened) -> None:
    async def work() -> None:
        async with opened() as (endpoint, session), httpx.AsyncClient(base_url=endpoint.url) as client:
            request = CHAT | {"stream": True}
            async with client.stream("POST", "/v1/chat/completions", json=request, headers=KEY) as answer:
                await anext(answer.aiter_lines())
            assert len(session.record.turns) == 1  # it has begun to read what was sampled
            assert (await client.post("/v1/chat/completions", json=CHAT, headers=KEY)).status_code == 200

    run(work())


def test_an_error_of_the_engine_is_kept_for_the_run(opened: Opened) -> None:
    class Broken(ScriptedEngine):
        async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
            raise OSError("a server died")

    async def work() -> None:
        async with opened(Broken) as (endpoint, session), httpx.AsyncClient(base_url=endpoint.url) as client:
            answer = await client.post("/v1/chat/completions", json=CHAT, headers=KEY)
            assert answer.status_code == 500 and "died" not in answer.text
            assert isinstance(session.failure, OSError)

    run(work())


def test_a_closed_endpoint_leaves_no_port_and_no_connection(opened: Opened) -> None:
    async def work() -> None:
        async with opened() as (endpoint, _):
            reader, _ = await asyncio.open_connection(*address(endpoint))
        assert await reader.read() == b""
        with pytest.raises(ConnectionRefusedError), socket.create_connection(address(endpoint), 5):
            pass

    run(work())


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_clients_of_both_read_the_same(opened: Opened, is_stream: bool) -> None:
    async def work() -> None:
        async with opened() as (endpoint, session):
            theirs = anthropic.AsyncAnthropic(base_url=endpoint.url, api_key="right", max_retries=0)
            ours = openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="right", max_retries=0)
            messages: Any = CHAT["messages"]
            if is_stream:
                async with theirs.messages.stream(model="any", max_tokens=64, messages=messages) as stream:
                    first = "".join([text async for text in stream.text_stream])
                chunks = await ours.chat.completions.create(model="any", messages=messages, stream=True)
                second = "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])
                events = [event async for event in await ours.responses.create(model="any", input="hello", stream=True)]
                third = events[-1].response.output_text  # type: ignore[union-attr]
            else:
                first = (await theirs.messages.create(model="any", max_tokens=64, messages=messages)).content[0].text  # type: ignore[union-attr]
                second = (await ours.chat.completions.create(model="any", messages=messages)).choices[0].message.content  # type: ignore[assignment]
                third = (await ours.responses.create(model="any", input="hello")).output_text
            assert first == second == third == "one two three"
            assert [turn.before for turn in session.record.turns] == [session.record.turns[0].before] * 3
            await theirs.close()
            await ours.close()

    run(work())


def test_a_conversation_may_change_its_protocol(opened: Opened) -> None:
    async def work() -> None:
        async with opened() as (endpoint, session), httpx.AsyncClient(base_url=endpoint.url) as client:
            said = (await client.post("/v1/messages", json=CHAT | {"max_tokens": 64}, headers=KEY)).json()["content"]
            more = [*CHAT["messages"], {"role": "assistant", "content": said[0]["text"]}, *CHAT["messages"]]  # type: ignore[misc]
            await client.post("/v1/chat/completions", json=CHAT | {"messages": more}, headers=KEY)
            assert len(session.record.sequences()) == 1

    run(work())


def address(endpoint: Endpoint) -> tuple[str, int]:
    host, port = endpoint.url.removeprefix("http://").split(":")
    return host, int(port)


def test_what_is_sent_is_json(opened: Opened) -> None:
    async def work() -> None:
        async with opened() as (endpoint, _), httpx.AsyncClient(base_url=endpoint.url) as client:
            answer = await client.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers=KEY)
            lines = [line for line in answer.text.split("\n\n") if line]
            assert answer.headers["content-type"].startswith("text/event-stream") and lines[-1] == "data: [DONE]"
            assert all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])

    run(work())
