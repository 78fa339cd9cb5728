"""Agents as processes: what they are told, what they leave, and that nothing is left of them."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from RL2.agents.programs import Programs
from RL2.config.agent import agent_of
from RL2.errors import ConfigError
from RL2.rollout.step_result import Unscored

TASK = {"row": 3, "seed": 5, "prompt": "12 'and' $(30)", "messages": [], "tools": [], "extra_info": {"answer": 42}}
Left = dict[str, Any] | None


def left(
    agent: str, task: dict[str, Any] = TASK, limit_s: float = 60, failed: Callable[[], bool] = lambda: False
) -> Left:
    async def run() -> Left:
        programs = Programs(agent_of("rollout.agent", agent))
        try:
            return await programs.run(task, {"OPENAI_API_KEY": "of the episode"}, limit_s, failed)
        finally:
            await programs.close()

    return asyncio.run(run())


def function(folder: Path, *lines: str, is_async: bool = False) -> str:
    file = folder / "agent.py"
    file.write_text(f"import os\n{'async ' * is_async}def play(task):\n    " + "\n    ".join(lines))
    return f"{file}:play"


def command(folder: Path, *lines: str) -> str:
    file = folder / "agent.py"
    file.write_text("import json, os, sys, time\n" + "\n".join(lines))
    return f"{sys.executable} {file}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("return 1", {"reward": 1}),
        ("return {'reward': {'a': 1, 'b': 0}, 'metrics': {'c': 2}}", {"reward": {"a": 1, "b": 0}, "metrics": {"c": 2}}),
        ("return task['prompt']", {"answer": TASK["prompt"]}),
        ("return task['extra_info']['answer'] + task['row']", {"reward": 45}),
        ("return os.environ['OPENAI_API_KEY']", {"answer": "of the episode"}),
        ("pass", None),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_function_returns_is_its_reward(tmp_path: Path, line: str, expected: Left, is_async: bool) -> None:
    assert left(function(tmp_path, line, is_async=is_async)) == expected


def test_a_command_gets_its_task_in_words_and_in_a_file(tmp_path: Path) -> None:
    program = command(
        tmp_path,
        "task = json.load(open(os.environ['RL2_TASK']))",
        "assert task['messages'] == [] and os.path.samefile(os.getcwd(), os.path.dirname(os.environ['RL2_TASK']))",
        "json.dump(' | '.join(sys.argv[1:]), open('reward.json', 'w'))",
    )
    assert left(f"{program} --ask={{prompt}} '{{answer}} {{seed}}' {{unknown}}") == {
        "answer": "--ask=12 'and' $(30) | 42 5 | {unknown}"
    }


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (["print('so far')", "sys.exit(3)"], "ended with exit status 3: so far"),
        (["raise ValueError('no \\x1b[31m')"], r"ended with exit status 1: ValueError: no"),
        (["os.kill(os.getpid(), 9)"], "killed by signal 9"),
        (["time.sleep(99)"], "longer than rollout.agent_timeout_s=3"),
        (["open('reward.json', 'w').write('{')"], "reward.json is not JSON"),
        (["open('reward.json', 'w').write(' ' * (1 << 21))"], "reward.json has more than 1048576 bytes"),
        (["os.mkdir('reward.json')"], "reward.json is no file"),
        (["os.mkfifo('reward.json')"], "reward.json is no file"),
    ],
    ids=["exit", "raise", "kill", "hang", "half", "large", "folder", "pipe"],
)
def test_an_agent_without_a_reward_is_unscored(tmp_path: Path, lines: list[str], cause: str) -> None:
    with pytest.raises(Unscored, match=cause):
        left(command(tmp_path, *lines), limit_s=3 if "sleep" in lines[0] else 60)


def test_secrets_and_ranks_stay_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "OPENAI_ORG_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "of the run")
    assert left(function(tmp_path, "return ' '.join(os.environ.values()).count('of the run')")) == {"reward": 0}


def test_only_a_function_gets_the_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine_alone.py").write_text("VALUE = 7")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/own")
    assert left(function(tmp_path, "import mine_alone", "return mine_alone.VALUE")) == {"reward": 7}
    assert left(command(tmp_path, "json.dump('PYTHONPATH' in os.environ, open('reward.json', 'w'))")) == {
        "reward": False
    }


def test_what_a_library_prints_on_import_is_no_message(tmp_path: Path) -> None:
    assert left(function(tmp_path, "import this", "return 1")) == {"reward": 1}


def test_the_signals_of_the_host_do_not_reach_the_files_of_an_agent(tmp_path: Path) -> None:
    lines = (
        "import subprocess",
        "files = [open(str(n), 'w+b', buffering=0) for n in range(8)]",
        "subprocess.run(['true'])",
        "return sum(len(open(file.name, 'rb').read()) for file in files)",
    )
    assert left(function(tmp_path, *lines)) == {"reward": 0}


def test_a_function_that_is_terminated_is_unscored(tmp_path: Path) -> None:
    with pytest.raises(Unscored, match="killed by signal 15"):
        left(function(tmp_path, "os.kill(os.getpid(), 15)", "return 1"))


CHILDREN = [
    "import subprocess",
    "subprocess.Popen(['sleep', '600'])",
    "subprocess.Popen(['sleep', '600'], start_new_session=True)",
    "if not os.fork():",
    "    os.setsid()",
    "    if not os.fork(): time.sleep(600)",
    "    os._exit(0)",
]


@pytest.mark.parametrize(
    "end", ["json.dump(1, open('reward.json', 'w'))", "os.kill(os.getpid(), 9)", "time.sleep(600)"]
)
def test_nothing_is_left_of_an_agent(tmp_path: Path, end: str) -> None:
    async def run() -> None:
        programs = Programs(agent_of("rollout.agent", command(tmp_path, *CHILDREN, end)))
        with suppress(Unscored):
            await programs.run(TASK, {}, 4, lambda: False)
        (host,) = of_agents()
        assert list(programs._dir.path.glob("*/")) == []  # type: ignore[union-attr]
        assert await settled(lambda: not alive(host.children(recursive=True)))
        await programs.close()
        assert await settled(lambda: not of_agents())

    asyncio.run(run())


@pytest.mark.parametrize("by", ["the run", "the host"])
def test_agents_end_with_the_run(tmp_path: Path, by: str) -> None:
    async def run() -> None:
        programs = Programs(agent_of("rollout.agent", command(tmp_path, *CHILDREN, "time.sleep(600)")))
        task = asyncio.create_task(programs.run(TASK, {}, 60, lambda: False))
        assert await settled(lambda: sum(len(p.children(recursive=True)) for p in of_agents()) >= 4)
        (host,) = of_agents()
        agents, children = host.children()[:1], host.children(recursive=True)
        if by == "the run":
            programs._host.stdin.close()  # type: ignore[union-attr]
        else:
            host.kill()  # as if the machine had chosen it
        with pytest.raises(RuntimeError, match="process that starts agents has ended"):
            await task
        await programs.close()
        assert await settled(lambda: not alive(children if by == "the run" else agents))
        for child in alive(children):
            child.kill()

    asyncio.run(run())


def test_an_episode_under_way_may_be_cancelled_after_the_end(tmp_path: Path) -> None:
    async def run() -> None:
        programs = Programs(agent_of("rollout.agent", command(tmp_path, "time.sleep(600)")))
        task = asyncio.create_task(programs.run(TASK, {}, 60, lambda: False))
        assert await settled(lambda: bool(of_agents() and of_agents()[0].children()))
        await programs.close()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_an_agent_whose_engine_failed_is_killed(tmp_path: Path) -> None:
    start = time.monotonic()
    assert left(command(tmp_path, "time.sleep(600)"), failed=lambda: time.monotonic() > start + 1) is None
    assert time.monotonic() - start < 60


def test_time_in_which_the_loop_does_not_run_is_not_the_agent_s(tmp_path: Path) -> None:
    programs = Programs(
        agent_of("rollout.agent", command(tmp_path, "time.sleep(2)", "open('reward.json', 'w').write('1')"))
    )
    with asyncio.Runner() as runner:

        async def begin() -> asyncio.Task[Left]:
            return asyncio.create_task(programs.run(TASK, {}, 30, lambda: False))

        async def end(task: asyncio.Task[Left]) -> Left:
            return await task

        task = runner.run(begin())
        runner.run(asyncio.sleep(0.5))
        time.sleep(4)  # an update
        assert runner.run(end(task)) == {"reward": 1}
        runner.run(programs.close())


@pytest.mark.parametrize(
    ("agent", "message"),
    [
        ("nothing.py:play", "nothing.py is not a file"),
        ("no-such-program --x", "the program 'no-such-program' is not found"),
        ("python 'x", "not a command"),
        ("", "the program '' is not found"),
    ],
)
def test_an_agent_that_is_not_there_is_refused(agent: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        agent_of("rollout.agent", agent)


def test_a_missing_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no function other"):
        agent_of("rollout.agent", function(tmp_path, "pass").replace(":play", ":other"))


def of_agents() -> list[psutil.Process]:
    """The host processes of this test."""
    return [child for child in psutil.Process().children() if any("host.py" in word for word in child.cmdline())]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


async def settled(holds: Callable[[], bool], limit_s: float = 20) -> bool:
    """Return whether it holds within the limit; a kill takes effect a little later."""
    end = time.monotonic() + limit_s
    while not holds() and time.monotonic() < end:
        await asyncio.sleep(0.05)
    return holds()
