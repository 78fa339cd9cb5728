"""Agents as processes: each episode starts one, waits for it within a limit, and reads the reward that it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from RL2.agents.host import MARK, RESULT
from RL2.config.agent import Agent
from RL2.config.secrets import is_secret
from RL2.engines.served.owned_dirs import SHORT, OwnedDir
from RL2.engines.served.server import NOT_INHERITED
from RL2.errors import one_line
from RL2.rollout.step_result import Unscored

HOST = Path(__file__).with_name("host.py")
TASK = "task.json"
"""File in an episode's folder with its task."""
TICK_S = 0.5
"""Interval at which the limit of a running agent is checked, in seconds."""
MAX_RESULT = 1 << 20
"""Limit of the reward's file in bytes."""
SHOWN_BYTES = 4000
OVERRIDDEN = ("OPENAI_", "ANTHROPIC_")
"""Prefixes of environment variables that lead a client elsewhere."""
FIELD = re.compile(r"\{(\w+)\}")


class Programs:
    """Agents under way on this process, started by one host process."""

    def __init__(self, agent: Agent, variables: tuple[str, ...] = ()) -> None:
        """Take the agent; the host starts with the first episode. `variables` are passed on although secret."""
        self.agent, self.variables = agent, variables
        self._dir: OwnedDir | None = None
        self._host: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._ended: dict[str, asyncio.Future[int]] = {}

    async def run(
        self, task: dict[str, Any], variables: Mapping[str, str], limit_s: float, failed: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Run the agent on `task` and return what it left as its reward, or None if it left nothing.

        Raise Unscored, with the cause, if it does not end by itself within `limit_s` and with exit status 0. Time in
        which this event loop does not run, such as that of an update, does not count. An agent for which `failed()`
        becomes true is killed, and None is returned.
        """
        await self._start_host()
        assert self._dir is not None
        episode = secrets.token_hex(8)
        folder = self._dir.path / episode
        folder.mkdir()
        log = folder / "output.log"
        work = folder / "work"
        work.mkdir()
        (work / TASK).write_text(json.dumps(task))
        ended = self._ended[episode] = asyncio.get_running_loop().create_future()
        order: dict[str, Any] = {"id": episode, "cwd": str(work), "log": str(log)}
        own = {MARK: episode, "RL2_TASK": str(work / TASK), "TMPDIR": str(work)}
        order["env"] = self._inherited() | dict(variables) | own
        if self.agent.function is None:
            order["argv"] = [_filled(word, task) for word in self.agent.words]
        else:
            order |= {"function": self.agent.function, "task": task}
        try:
            self._order(order)
            status = await self._wait(ended, limit_s, failed)
            if failed():
                return None
            if status is None:
                raise Unscored(f"the agent took longer than rollout.agent_timeout_s={limit_s:g} and was killed")
            if status < 0:
                raise Unscored(f"the agent was killed by signal {-status}{_last_line(log)}")
            if status:
                raise Unscored(f"the agent ended with exit status {status}{_last_line(log)}")
            return _result(work / RESULT)
        finally:
            if not ended.done() and self._host is not None:  # a closed host has killed its agents
                self._order({"id": episode, "kill": True})
                with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                    await asyncio.wait_for(asyncio.shield(ended), 10)
            del self._ended[episode]
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)  # it may be large

    async def close(self) -> None:
        """Kill all agents and end the host; may be called again."""
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if self._host is not None:
            assert self._host.stdin is not None
            self._host.stdin.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._host.wait(), 10)
            if self._host.returncode is None:
                self._host.kill()
            self._host = None
        if self._dir is not None:
            self._dir.remove()
            self._dir = None

    async def _start_host(self) -> None:
        async with self._starting:
            if self._host is None:
                await self._launch()

    async def _launch(self) -> None:
        self._dir = OwnedDir(SHORT, "rl2-agents-")
        ahead = [str(self.agent.file)] if self.agent.file else []
        self._host = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            str(HOST),
            *ahead,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=self._inherited(),
            start_new_session=True,
        )
        self._reading = asyncio.create_task(self._read(self._host))

    async def _read(self, host: asyncio.subprocess.Process) -> None:
        """Note which agents have ended, until the host ends."""
        assert host.stdout is not None
        with contextlib.suppress(ValueError, KeyError):  # not a message: nothing more can be read
            async for line in host.stdout:
                message = json.loads(line)
                ended = self._ended.get(message.get("id", ""))
                if ended is not None and not ended.done():
                    ended.set_result(message["status"])
        for ended in self._ended.values():
            if not ended.done():
                ended.set_exception(RuntimeError("the process that starts agents has ended"))

    def _order(self, order: dict[str, Any]) -> None:
        if self._host is None or self._host.stdin is None or self._host.returncode is not None:
            raise RuntimeError("the process that starts agents has ended")
        self._host.stdin.write(json.dumps(order).encode() + b"\n")

    def _inherited(self) -> dict[str, str]:
        """Return the environment variables that agents get: those of this process without ranks and other secrets."""
        # a command may be another Python, with packages of its own
        kept = () if self.agent.function is None else ("PYTHON",)
        dropped = (*OVERRIDDEN, *(prefix for prefix in NOT_INHERITED if prefix not in kept))
        return {
            name: value
            for name, value in os.environ.items()
            if name in self.variables or not (name.startswith(dropped) or is_secret(name))
        }

    async def _wait(self, ended: asyncio.Future[int], limit_s: float, failed: Callable[[], bool]) -> int | None:
        """Return the status of an agent; None if it is not there in time, or once `failed()` is true."""
        loop, used = asyncio.get_running_loop(), 0.0
        while used < limit_s and not failed():
            before = loop.time()
            step_s = min(TICK_S, limit_s - used)
            await asyncio.wait({ended}, timeout=step_s)
            if ended.done():
                return ended.result()
            used += min(loop.time() - before, 2 * step_s)  # more than that is time without a running loop
        return None


def _filled(word: str, task: Mapping[str, Any]) -> str:
    """Return a word of the command with the fields of the task in place of their names in braces."""
    known = {**task["extra_info"], **task}
    return FIELD.sub(lambda found: _text(known[found[1]]) if found[1] in known else found[0], word)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _result(file: Path) -> dict[str, Any] | None:
    """Return the reward in the file of an agent, or None if there is no such file. Raise Unscored if it is invalid."""
    if not file.exists():
        return None
    if not file.is_file():  # to read a pipe could take for ever
        raise Unscored(f"{RESULT} is no file")
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_RESULT + 1)
    except OSError as error:
        raise Unscored(f"{RESULT} cannot be read: {error}") from error
    if len(data) > MAX_RESULT:
        raise Unscored(f"{RESULT} has more than {MAX_RESULT} bytes")
    try:
        result = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Unscored(f"{RESULT} is not JSON: {error}") from error
    if isinstance(result, dict):
        return result
    return {"answer": result} if isinstance(result, str) else {"reward": result}


def _last_line(log: Path) -> str:
    """Return the last line of an agent's output, for error messages."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - SHOWN_BYTES))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        if lines:
            return f": {one_line(lines[-1])[:300]}"
    return ""
