"""Graders that may hang, eat memory or crash, in processes of their own: shared by environments.

    grade = Workers(__file__, "make_grader", limit_s=5)
    right = await grade(gold, answer)

has `make_grader()` of that script make a function elsewhere, once in each process and without a limit, for libraries
take their time to load; then it is called there. What it takes and returns is JSON. A call that takes too long is ended
by the kernel, which asks neither Python nor C code, and raises here. Processes are kept for later calls; one that is
idle ends when its parent does, however that ended, and a busy one within its limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

MEMORY = 4 << 30
"""Bytes of address space that a worker may have."""


class WorkerError(RuntimeError):
    """A call has no value: it failed, took too long, or its process died."""


class Workers:
    """What `make()` of the file `script` returns, called in up to `number` processes, at most `limit_s` s a call."""

    def __init__(self, script: str, make: str, limit_s: float, number: int | None = None) -> None:
        # -P: neither this folder nor the working directory may shadow a library
        self.command = [sys.executable, "-P", __file__, script, make, str(limit_s)]
        self.limit_s = limit_s
        self.number = number or min(8, os.cpu_count() or 1)
        self._threads: ThreadPoolExecutor | None = None
        self._idle: list[subprocess.Popen[str]] = []

    async def __call__(self, *args: Any) -> Any:
        """The value. Raises `WorkerError` where there is none."""
        if self._threads is None:  # one for each process, so that no more than `number` are under way
            self._threads = ThreadPoolExecutor(self.number, thread_name_prefix="worker")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, json.dumps(args) + "\n")

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
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            raise WorkerError(self._cause(process.wait()))
        self._idle.append(process)
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["value"]

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

    def _cause(self, code: int) -> str:
        if code == -signal.SIGALRM:
            return f"took longer than {self.limit_s:g} s and was killed"
        return f"its process died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def serve(script: str, make: str, limit_s: float) -> None:
    """Answer calls until the parent closes the pipe; a line each."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print is no reply
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    call = _made(Path(script), make)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            reply = {"value": call(*json.loads(line))}
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
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
