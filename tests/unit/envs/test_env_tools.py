"""`envs/tools.py` runs functions and MCP servers, answers every call, and leaves no process behind."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from RL2.config.scripts import ScriptError
from RL2.data.tool_calls import ToolCall
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.step_result import StepResult, Unscored

SCRIPT = Path(__file__).parents[3] / "envs" / "tools.py"
SERVER = Path(__file__).parents[2] / "mcp_server.py"
FUNCTIONS = '''
import time

def add(a: int, b: int = 1) -> int:
    """
    Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b

async def hang(seconds: float) -> str:
    """
    Wait.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return "awake"

def no_tool(x):
    return x
'''
Load = Callable[..., Environment]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """The environment with functions, or with the servers that are given."""
    loaded: list[Environment] = []

    def load(servers: dict[str, Any] | None = None, **variables: str) -> Environment:
        if servers is None:
            (file := tmp_path / "own.py").write_text(FUNCTIONS)
        else:
            (file := tmp_path / "servers.json").write_text(json.dumps({"mcpServers": servers}))
        for name, value in ({"TOOLS": str(file)} | variables).items():
            monkeypatch.setenv(name, value)
        loaded.append(load_environment(SCRIPT, 60))
        return loaded[-1]

    yield load
    for environment in loaded:
        environment.close()


def stdio() -> dict[str, Any]:
    return {"harbour": {"command": sys.executable, "args": [str(SERVER)]}}


def children() -> list[psutil.Process]:
    """Return the server processes that this process has."""
    return [child for child in psutil.Process().children(recursive=True) if str(SERVER) in child.cmdline()]


def turn(environment: Environment, *calls: ToolCall, action: str = "", **extra_info: Any) -> StepResult:
    return asyncio.run(environment.step("q", action, extra_info, None, list(calls)))


def contents(result: StepResult) -> list[str]:
    assert isinstance(result.next_state, list)
    assert {message["role"] for message in result.next_state} == {"tool"}
    return [message["content"] for message in result.next_state]


def test_functions(load: Load) -> None:
    environment = load(TOOL_TIMEOUT_S="3", TOOL_MAX_CALLS="6", TOOL_MAX_CHARS="200")
    assert environment.example is not None
    row = environment.example({"question": "1+2?", "answer": "3"})
    assert row is not None and row["messages"] == [{"role": "user", "content": "1+2?"}]
    assert [tool["function"]["name"] for tool in row["tools"]] == ["add", "hang"]
    assert row["tools"][0]["function"]["parameters"]["required"] == ["a"]
    result = turn(
        environment,
        ToolCall("add", {"a": 1, "b": 2}),
        ToolCall("add", {"b": 2}),
        ToolCall("hang", {"seconds": 60}),
        ToolCall("no_tool", {"x": 1}),
        ToolCall("", {}, "it has no name of a tool"),
        ToolCall("add", {"a": "x" * 300, "b": "y"}),
        ToolCall("add", {"a": 1}),
    )
    right, missing, late, unknown, unreadable, long, beyond = contents(result)
    assert right == "3"
    assert missing.startswith("error: TypeError: add() missing 1 required positional argument")
    assert late == "error: took longer than 3 s and was killed"
    assert unknown == "error: there is no tool 'no_tool'; there are add, hang"
    assert unreadable == "error: the call cannot be read: it has no name of a tool"
    assert long == "" + "x" * 200 + "... (101 more characters)"
    assert beyond == "error: a response can have 6 calls"
    assert not result.done and result.metrics == {"tool_calls": 7, "tool_errors": 5}


def test_final_answers(load: Load, tmp_path: Path) -> None:
    environment = load()
    for action, answer, reward in [
        ("It is 3.\n#### 3.0", "3", 1.0),
        ("So:\nThe tide", "tide", 1.0),
        ("<think>3", "3", 0.0),
        ("<think>4</think>3", "3", 1.0),
        ("4", "3", 0.0),
    ]:
        result = turn(environment, action=action, answer=answer)
        assert (result.done, result.reward) == (True, reward), action
    (tmp_path / "own_grader.py").write_text("async def half(answer, extra_info):\n    return len(answer) / 2\n")
    assert turn(load(GRADER=f"{tmp_path / 'own_grader.py'}:half"), action="abc").reward == 1.5
    with pytest.raises(ScriptError, match=r"GRADER=own.py: expected path.py:function"):
        load(GRADER="own.py")


def test_a_function_without_types_is_named(load: Load, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text('def f(x):\n    """Do it.\n\n    Args:\n        x: It.\n    """\n')
    environment = load(TOOLS=str(tmp_path / "bad.py"))
    assert environment.example is not None
    with pytest.raises(ValueError, match=r"bad\.py: f is not a tool: Argument x is missing a type hint"):
        environment.example({"prompt": "x"})


@pytest.mark.slow
def test_a_server_over_stdio(load: Load) -> None:
    environment = load(stdio(), TOOL_TIMEOUT_S="4")
    assert environment.example is not None
    row = environment.example({"prompt": "High tide?"})
    assert row is not None
    assert [tool["function"]["name"] for tool in row["tools"]] == ["tide", "wait", "die"]
    assert row["tools"][0]["function"]["parameters"]["required"] == ["harbour"]
    start_s = time.monotonic()
    result = turn(
        environment,
        ToolCall("tide", {"harbour": "Pell", "days": 2}),
        ToolCall("tide", {"harbour": "Nowhere"}),
        ToolCall("tide", {"days": 2}),
        *[ToolCall("wait", {"seconds": 1.5}) for _ in range(3)],
        ToolCall("wait", {"seconds": 60}),
    )
    assert time.monotonic() - start_s < 30
    right, wrong, missing, *waited, late = contents(result)
    assert right == "Pell: 06:12 for 2 days"
    assert wrong.startswith("error: ") and "no such harbour" in wrong
    assert missing.startswith("error: ") and "harbour" in missing
    assert late == "error: it took longer than 4 s"
    (server,) = children()
    assert len(set(waited)) == 1, "one process for all calls"
    with pytest.raises(Unscored, match="the MCP server harbour failed"):
        turn(environment, ToolCall("die", {}))
    assert contents(turn(environment, ToolCall("tide", {"harbour": "Pell"}))) == ["Pell: 06:12 for 1 days"]
    environment.close()
    psutil.wait_procs([server, *children()], timeout=10)
    assert not children()


@pytest.mark.slow
def test_a_server_over_http(load: Load) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, str(SERVER), str(port)]) as process:
        try:
            deadline_s = time.monotonic() + 60
            while time.monotonic() < deadline_s:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            url = f"http://127.0.0.1:{port}/mcp"
            environment = load({"harbour": {"url": url, "headers": {"X-Key": "secret"}}})
            calls = [ToolCall("tide", {"harbour": "Pell"}), ToolCall("tide", {"harbour": "Nowhere"})]
            right, wrong = contents(turn(environment, *calls))
            assert right == "Pell: 06:12 for 1 days"
            assert "no such harbour" in wrong
        finally:
            process.kill()
    with pytest.raises(Unscored, match="the MCP server harbour failed"):
        turn(environment, ToolCall("tide", {"harbour": "Pell"}))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the process on Linux alone")
def test_a_server_ends_when_the_run_is_killed(tmp_path: Path) -> None:
    (tmp_path / "servers.json").write_text(json.dumps({"mcpServers": stdio()}))
    source = f"""
import asyncio
from RL2.data.tool_calls import ToolCall
from RL2.rollout.environment import load_environment
environment = load_environment({str(SCRIPT)!r}, 60)
step = environment.step("q", "", {{}}, None, [ToolCall("wait", {{"seconds": 0}})])
print(asyncio.run(step).next_state[0]["content"], flush=True)
input()
"""
    command = [sys.executable, "-c", source]
    env = {"TOOLS": str(tmp_path / "servers.json"), "PYTHONPATH": str(SCRIPT.parents[1]), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True) as run:
        assert run.stdout is not None
        server = psutil.Process(int(run.stdout.readline()))
        run.kill()
    server.wait(timeout=10)
