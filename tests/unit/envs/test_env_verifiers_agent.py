"""Environments of the package verifiers as an agent, with a server that answers in place of the policy."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
Answer = Callable[[dict[str, Any]], dict[str, Any]]


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve chat completions with the messages that `answer` makes of each request; yield the address and requests."""
    asked: list[dict[str, Any]] = []

    async def complete(http: Request) -> JSONResponse:
        asked.append(await http.json())
        if (found := answer(asked[-1])) == {"content": ""}:
            return JSONResponse({"error": {"message": "refused"}}, status_code=400)
        message = {"role": "assistant", "content": None} | found
        finish = "tool_calls" if "tool_calls" in message else "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "policy"}
        return JSONResponse(head | {"choices": [choice], "usage": usage})

    with listening([Route("/v1/chat/completions", complete, methods=["POST"])]) as url:
        yield f"{url}/v1", asked


@contextmanager
def listening(routes: list[Route]) -> Iterator[str]:
    """Serve routes on a loopback port and yield their address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def agent() -> Iterator[ModuleType]:
    """The agent under its own name, as the process that starts agents imports it."""
    spec = importlib.util.spec_from_file_location("verifiers_agent", ROOT / "envs" / "agents" / "verifiers_agent.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["verifiers_agent"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["verifiers_agent"]


Play = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture
def play(agent: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Play one episode; return what the agent leaves and the requests that it made."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "tasksets")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests/tasksets")  # of servers of tools
    monkeypatch.setenv("VERIFIERS_TASKSET", "guessing")
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-episode")
    monkeypatch.setenv("OPENAI_MODEL", "policy")

    def play(answer: Answer, *, seed: int = 0, max_turns: int = 4) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        with serving(answer) as (url, asked):
            monkeypatch.setenv("OPENAI_BASE_URL", url)
            return asyncio.run(agent.play({"seed": seed, "max_turns": max_turns})), asked

    return play


def says(*texts: str) -> Answer:
    left = list(texts)
    return lambda request: {"content": left.pop(0) if len(left) > 1 else left[0]}


def test_several_turns_with_the_parts_of_the_reward(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERIFIERS_CONFIG", '{"num_tasks": 3}')
    left, asked = play(says("Well", "7", "2"), seed=5)
    assert left == {"reward": {"found": 1.0, "form": pytest.approx(0.5 * 2 / 3)}, "metrics": {"guesses": 3.0}}
    assert [(message["role"], message["content"]) for message in asked[-1]["messages"]] == [
        ("system", "Numbers."),
        ("user", "Guess, game 2."),
        ("assistant", "Well"),
        ("user", "No number."),
        ("assistant", "7"),
        ("user", "Not 7."),
    ]


def test_an_episode_without_an_end_is_scored_at_the_limit_of_turns(play: Play) -> None:
    left, asked = play(says("9"), max_turns=2)
    assert len(asked) == 2
    assert left == {"reward": {"found": 0.0, "form": 0.5}, "metrics": {"guesses": 2.0}}


def test_a_tool_with_a_state(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        told = [message["content"] for message in request["messages"] if message["role"] == "tool"]
        if told[1:]:
            return {"content": told[-1]}
        arguments = '{"a": 3, "b": 3}' if told else "no JSON"
        call = {"id": f"c{len(told)}", "type": "function", "function": {"name": "add", "arguments": arguments}}
        return {"tool_calls": [call]}

    monkeypatch.setenv("VERIFIERS_TASKSET", "adding")
    left, asked = play(answer, seed=3)
    assert left == {"reward": {"right": 1.0}, "metrics": {"calls": 1.0}}
    (offered,) = (tool["function"] for tool in asked[0]["tools"])
    assert (offered["name"], offered["description"]) == ("add", "Return the sum of two numbers.")
    assert "invalid JSON" in asked[1]["messages"][-1]["content"]


def test_a_resources_server_as_of_nemo_gym(play: Play, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package's own taskset leaves tools and rewards to an HTTP server, which knows an episode by its cookie."""

    async def seed_session(http: Request) -> JSONResponse:
        answer = JSONResponse({})
        answer.set_cookie("session", str((await http.json())["expected"]))
        return answer

    async def double(http: Request) -> JSONResponse:
        return JSONResponse({"double": 2 * (await http.json())["number"], "session": http.cookies["session"]})

    async def verify(http: Request) -> JSONResponse:
        sent = await http.json()
        *_, last = sent["response"]["output"]
        reward = float(last["content"][0]["text"] == http.cookies["session"])
        return JSONResponse(sent | {"reward": reward, "num_items": len(sent["response"]["output"])})

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["messages"][-1]["role"] == "tool":
            return {"content": str(json.loads(request["messages"][-1]["content"])["double"])}
        function = {"name": "double", "arguments": '{"number": 21}'}
        return {"tool_calls": [{"id": "c1", "type": "function", "function": function}]}

    number = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
    tool = {"type": "function", "name": "double", "description": "Twice a number.", "parameters": number}
    params = {"input": [{"role": "user", "content": "Twice 21?"}], "tools": [tool]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"responses_create_params": params, "expected": 42}))
    paths = {"/seed_session": seed_session, "/double": double, "/verify": verify}
    with listening([Route(path, function, methods=["POST"]) for path, function in paths.items()]) as url:
        settings = {"dataset": f"{tmp_path}/rows.jsonl", "task": {"resources_url": url}}
        monkeypatch.setenv("VERIFIERS_TASKSET", "nemo-gym")
        monkeypatch.setenv("VERIFIERS_CONFIG", json.dumps(settings))
        left, asked = play(answer)
    assert left == {"reward": {"nemo_gym": 1.0}, "metrics": {"expected": 42.0, "num_items": 3.0}}
    assert asked[0]["messages"][-1]["content"] == "Twice 21?"


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"VERIFIERS_TASKSET": "unknown_taskset"}, "taskset 'unknown_taskset' not found"),
        ({"VERIFIERS_CONFIG": '{"num_tasks": 0}'}, "the taskset guessing holds no task"),
        ({"VERIFIERS_ENV": "user-sim"}, "the policy may not play user, which the environment does not train"),
    ],
    ids=["unknown", "empty", "frozen"],
)
def test_a_wrong_setting_raises_its_cause(
    play: Play, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], cause: str
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, ModuleNotFoundError), match=cause):
        play(says("Hello?", "0", "###DONE###"))


def test_a_role_with_a_model_of_its_own_is_not_the_policy(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERIFIERS_ENV", "user-sim")
    with serving(says("What is it?", "###DONE###")) as (url, asked_user):
        user = {"model": "frozen", "client": {"type": "eval", "base_url": url, "api_key_var": "NONE"}}
        monkeypatch.setenv("VERIFIERS_ENV_CONFIG", json.dumps({"user": user}))
        left, asked = play(says("0"))
    assert [request["model"] for request in asked_user] == ["frozen"] * 2
    assert [request["model"] for request in asked] == ["policy"]
    assert left["reward"] == {"found": 1.0, "form": 0.5}
    assert left["metrics"] == {"guesses": 1.0, "user_turns": 2.0}


def test_a_refused_request_fails_the_episode(play: Play) -> None:
    with pytest.raises(RuntimeError, match=r"ProviderError: .*400"):
        play(says(""))
