"""Episodes of OpenEnv's servers through their adapter; the package itself is no requirement of the tests."""

from __future__ import annotations

import asyncio
import copy
import gc
import importlib.util
import json
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from random import Random
from typing import Any

import httpx
import pytest
from openenv_server import served
from websockets.asyncio.client import connect
from websockets.asyncio.server import serve as serve_sockets

from envs import openenv

NUMBER = {"title": "Guess", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
TEXT = {"title": "Say", "properties": {"message": {"type": "string"}}, "required": ["message"]}
TWO = {"title": "Move", "properties": {"x": {}, "y": {}}, "required": ["x", "y"]}
needs_openenv = pytest.mark.skipif(importlib.util.find_spec("openenv") is None, reason="pip install openenv")


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ('{"x": 1, "y": 2}', TWO, {"x": 1, "y": 2}),
        ('```json\n{"x": 1, "y": 2}\n```', TWO, {"x": 1, "y": 2}),
        (" 7\n", NUMBER, {"number": 7}),
        ("seven", NUMBER, {"number": "seven"}),
        ("7", TEXT, {"message": "7"}),
        ("two words", TEXT, {"message": "two words"}),
        ("[1, 2]", TWO, None),
        ("move", TWO, None),
        ("move", {}, None),
        ("[" * 50_000, TWO, None),
    ],
)
def test_a_response_is_an_action(text: str, schema: dict[str, Any], expected: dict[str, Any] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="no JSON object"):
            openenv.action_of(text, schema)
    else:
        assert openenv.action_of(text, schema) == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"hint": "Higher.", "metadata": {"secret": 3}}, "Higher."),
        ({"board": [[1]], "turn": "é", "metadata": {}}, '{"board": [[1]], "turn": "é"}'),
        ({"metadata": {}}, "{}"),
    ],
)
def test_an_observation_is_its_text_or_json(fields: dict[str, Any], text: str) -> None:
    assert openenv.observation({"observation": fields}) == text


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Serve a game to the adapter until the test ends."""
    with ExitStack() as stack:
        yield lambda game: monkeypatch.setattr(openenv, "URL", stack.enter_context(served(game)))


def run(episode: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(episode(), 120))


@pytest.mark.slow
@needs_openenv
def test_a_game_over_several_turns(serve: Callable[[str], None]) -> None:
    number = Random(3).randint(0, 9)

    async def episode() -> None:
        extra_info: dict[str, Any] = {"seed": 3}
        (first,) = await openenv.reset(extra_info)
        assert first["content"].startswith(openenv.PROMPT)
        assert '"number": {"title": "Number", "type": "integer"}' in first["content"]
        assert first["content"].endswith("Reply with the value of 'number' alone.\n\nA number from 0 to 9.")
        wrong = await openenv.step("s", "seven", extra_info)
        assert (wrong["reward"], wrong["done"]) == (0.0, False)
        assert "That is not an action" in wrong["next_state"][0]["content"]
        low = await openenv.step("s", f"<think>{number}</think>-1", extra_info)
        assert (low["reward"], low["next_state"]) == (-0.25, [{"role": "user", "content": "Higher."}])
        last = await openenv.step("s", json.dumps({"number": number}), extra_info)
        assert (last["reward"], last["score"], last["done"], last["next_state"]) == (1.0, 1.0, True, None)

    serve("guessing")
    run(episode)


@pytest.mark.slow
@needs_openenv
def test_a_full_server_gives_a_place_when_an_episode_is_dropped(serve: Callable[[str], None]) -> None:
    async def episode() -> None:
        kept: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2}]
        for extra_info in kept:
            await openenv.reset(extra_info)
        waiting: dict[str, Any] = {"seed": 3}
        task = asyncio.create_task(openenv.reset(waiting))
        await asyncio.sleep(1)
        assert not task.done()
        kept.clear()  # as the trainer drops episodes at the limit of turns
        del extra_info
        gc.collect()
        await task
        assert (await openenv.step("s", "-1", waiting))["reward"] == -0.25

    serve("guessing")
    run(episode)


@pytest.mark.slow
@needs_openenv
def test_tools_of_an_environment(serve: Callable[[str], None]) -> None:
    async def episode() -> None:
        extra_info: dict[str, Any] = {"seed": 3}
        (first,) = await openenv.reset(extra_info)
        assert "Return the sum of two numbers." in first["content"] and openenv.CALL in first["content"]
        call = {"type": "call_tool", "tool_name": "add", "arguments": {"a": 2, "b": 3}}
        result = await openenv.step("s", json.dumps(call), extra_info)
        assert '"data": 5' in result["next_state"][0]["content"]

    serve("adding")
    run(episode)


@pytest.mark.slow
@needs_openenv
def test_arguments_of_reset(serve: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openenv, "RESET", {"most": 0})

    async def episode() -> None:
        extra_info: dict[str, Any] = {"seed": 3}
        assert (await openenv.reset(extra_info))[0]["content"].endswith("A number from 0 to 0.")
        assert (await openenv.step("s", "0", extra_info))["reward"] == 1.0

    serve("guessing")
    run(episode)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openenv, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(openenv, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(httpx.TimeoutException):
            run(lambda: openenv.reset({"seed": 0}))


def test_a_session_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openenv, "TIMEOUT_S", 0.2)

    async def episode() -> None:
        async with serve_sockets(lambda socket: socket.wait_closed(), "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            session = openenv.Session(await connect(f"ws://127.0.0.1:{port}", proxy=None))
            assert copy.deepcopy({"session": session})["session"] is session
            with pytest.raises(TimeoutError):
                await openenv.step("s", "1", {"session": session, "schema": NUMBER})
            session.end()

    run(episode)
