"""Worker processes for graders that may hang, use too much memory or crash; shared by environments.

    grade = Workers(__file__, "make_grader", limit_s=5)
    right = await grade(gold, answer)

calls `make_grader()` of that script in another process, once per process and without the limit, since libraries take
time to load. The function that it returns is then called there, in the main thread, as libraries with their own limits
require; arguments and results are JSON. A process that exceeds the limit is killed, and the call raises WorkerError.
The limit is in processor time, so that a busy machine leaves no right answer unscored; a wider limit of wall-clock time
backs it. Processes are reused. An idle one ends when its parent does; a busy one soon after.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

MEMORY = 4 << 30
"""Limit of a worker's address space in bytes."""
START_S = 120
"""Seconds for libraries to load."""
PATIENCE = 10
"""Default ratio of the wall-clock limit to the limit of processor time, since others use the processors too."""


class WorkerError(RuntimeError):
    """A call has no result: it failed, took too long, or its process died."""


class Workers:
    """Pool of up to `number` processes that call the function returned by `make()` of the file `script`.

    The default number is this process's share of the cores, at most 8. A call has `limit_s` seconds of processor time,
    and ends after `wall_s` seconds in any case (by default `PATIENCE` times as many).
    """

    def __init__(
        self, script: str, make: str, limit_s: float, number: int | None = None, wall_s: float | None = None
    ) -> None:
        # -P: neither this folder nor the working directory may shadow a library
        self.command = [sys.executable, "-P", __file__, script, make, str(limit_s)]
        self.limit_s = limit_s
        self.wall_s = limit_s * PATIENCE if wall_s is None else wall_s
        trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun: number of processes on this machine
        self.number = number or max(1, min(8, (os.cpu_count() or 1) // trainers))
        self._threads: ThreadPoolExecutor | None = None
        self._idle: list[subprocess.Popen[str]] = []

    async def __call__(self, *args: Any) -> Any:
        """Return the function's result. Raise `WorkerError` if there is none."""
        return await self.hand_in(json.dumps(args) + "\n")

    async def hand_in(self, request: str) -> Any:
        """Return the answer of a process to `request`. Raise WorkerError if there is none."""
        if self._threads is None:  # one per process, so that at most `number` calls run at once
            self._threads = ThreadPoolExecutor(self.number, thread_name_prefix="worker")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, request)

    def close(self) -> None:
        """End the processes; a later call starts them again."""
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None
        while self._idle:
            process = self._idle.pop()
            process.communicate()

    def _call(self, request: str) -> Any:
        process = self._idle.pop() if self._idle else self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the cause of its death is determined below
            process.stdin.write(request)
            process.stdin.flush()
        reply = self._read(process, self.wall_s)
        self._idle.append(process)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["value"]

    def _start(self) -> subprocess.Popen[str]:
        # a fixed hash seed, so that all workers iterate over sets in the same order
        return self._launch(os.environ | {"PYTHONHASHSEED": "0"})[0]

    def _launch(self, env: Mapping[str, str], cwd: str | None = None) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """Start a process; return it with its ready message. Raise WorkerError if it sends none."""
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,  # the parent handles Ctrl-C
            cwd=cwd,
            env=env,
        )
        return process, self._read(process, START_S)

    def _read(self, process: subprocess.Popen[str], limit_s: float) -> dict[str, Any]:
        """Return the next line from `process`, parsed; otherwise end the process and raise `WorkerError`."""
        assert process.stdin is not None and process.stdout is not None
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        is_late = not waiting.poll(limit_s * 1000)
        if is_late:
            process.kill()
        line = process.stdout.readline()
        if line.endswith("\n") and not is_late:
            return json.loads(line)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait()
        if is_late:
            raise WorkerError(f"took longer than {limit_s:g} s and was killed")
        if code == -signal.SIGPROF:
            raise WorkerError(f"took longer than {self.limit_s:g} s of processor time and was killed")
        raise WorkerError(f"its process died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})")


def serve(script: str, make: str, limit_s: float) -> None:
    """Answer calls, one per line, until the parent closes the pipe."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # output of libraries is not a reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    call = _made(Path(script), make)
    replies.write("{}\n")  # ready
    replies.flush()
    for line in sys.stdin:
        # the parent limits wall-clock time; this timer limits work, even if the parent is gone
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            reply = json.dumps({"value": call(*json.loads(line))})
        except BaseException as error:
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply + "\n")
        replies.flush()


def _made(script: Path, make: str) -> Callable[..., Any]:
    """Return what the script's `make` returns; if it fails, a function that raises the failure at each call."""
    try:
        package = sys.modules["scripts"] = ModuleType("scripts")  # lets scripts import their siblings
        package.__path__ = [str(script.parent)]
        return getattr(importlib.import_module(f"scripts.{script.stem}"), make)()
    except Exception as error:
        failure = error

    def fail(*args: Any) -> Any:
        raise failure

    return fail


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], float(sys.argv[3]))
