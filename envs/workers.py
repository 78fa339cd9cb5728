"""Graders that may hang, eat memory or crash, in processes of their own: shared by environments.

    grade = Workers(__file__, "make_grader", limit_s=5)
    right = await grade(gold, answer)

has `make_grader()` of that script make a function elsewhere, once in each process and without that limit, for libraries
take their time to load. Then it is called there, in the main thread, as libraries with limits of their own want it;
what it takes and returns is JSON. A process that takes too long is killed, whatever it does, and the call raises here.
The limit is of processor time, so that a busy machine makes no right answer unscored; behind it is a wider one of time.
Processes are kept for later calls. An idle one ends when its parent does, however that ended; a busy one soon after.
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
"""Bytes of address space that a worker may have."""
START_S = 120
"""Seconds for libraries to load."""
PATIENCE = 10
"""How much longer than its limit of processor time a call may take, by default: others want the processors too."""


class WorkerError(RuntimeError):
    """A call has no value: it failed, took too long, or its process died."""


class Workers:
    """What `make()` of the file `script` returns, called in up to `number` processes.

    By default there are as many as this process's share of the cores, up to 8. A call has `limit_s` seconds of
    processor time, and ends after `wall_s` seconds whatever it does (`PATIENCE` times as many by default).
    """

    def __init__(
        self, script: str, make: str, limit_s: float, number: int | None = None, wall_s: float | None = None
    ) -> None:
        # -P: neither this folder nor the working directory may shadow a library
        self.command = [sys.executable, "-P", __file__, script, make, str(limit_s)]
        self.limit_s = limit_s
        self.wall_s = limit_s * PATIENCE if wall_s is None else wall_s
        trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's word for processes on this machine
        self.number = number or max(1, min(8, (os.cpu_count() or 1) // trainers))
        self._threads: ThreadPoolExecutor | None = None
        self._idle: list[subprocess.Popen[str]] = []

    async def __call__(self, *args: Any) -> Any:
        """The value. Raises `WorkerError` where there is none."""
        return await self.hand_in(json.dumps(args) + "\n")

    async def hand_in(self, request: str) -> Any:
        """Return the answer of a process to `request`. Raise WorkerError where there is none."""
        if self._threads is None:  # one for each process, so that no more than `number` are under way
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
        with contextlib.suppress(BrokenPipeError):  # how it died is found out below
            process.stdin.write(request)
            process.stdin.flush()
        reply = self._read(process, self.wall_s)
        self._idle.append(process)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["value"]

    def _start(self) -> subprocess.Popen[str]:
        # no worker iterates over a set in another order
        return self._launch(os.environ | {"PYTHONHASHSEED": "0"})[0]

    def _launch(self, env: Mapping[str, str], cwd: str | None = None) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """Start a process; return it, and what it says when it is ready. Raise WorkerError if it says nothing."""
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,  # Ctrl-C is the parent's to handle
            cwd=cwd,
            env=env,
        )
        return process, self._read(process, START_S)

    def _read(self, process: subprocess.Popen[str], limit_s: float) -> dict[str, Any]:
        """The next line from `process`; without one, the process is done with. Raises `WorkerError`."""
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
    """Answer calls until the parent closes the pipe; a line each."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print is no reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    call = _made(Path(script), make)
    replies.write("{}\n")  # ready
    replies.flush()
    for line in sys.stdin:
        # the parent kills by the clock; this one counts work, and kills where the parent is gone too
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            reply = json.dumps({"value": call(*json.loads(line))})
        except BaseException as error:
            reply = json.dumps({"error": f"{type(error).__name__}: {error}"[:500]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(reply + "\n")
        replies.flush()


def _made(script: Path, make: str) -> Callable[..., Any]:
    """What the script makes; if it cannot, a function that says so at each call."""
    try:
        package = sys.modules["scripts"] = ModuleType("scripts")  # so that scripts find their siblings
        package.__path__ = [str(script.parent)]
        return getattr(importlib.import_module(f"scripts.{script.stem}"), make)()
    except Exception as error:
        failure = error

    def fail(*args: Any) -> Any:
        raise failure

    return fail


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], float(sys.argv[3]))
