"""Processes that run and test programs written by a model; sandbox_child.py is the code that they run.

    programs = Programs(limit_s=5, memory_bytes=1 << 30)
    programs.check()                                    # refuses a machine that cannot confine a program
    await programs.test([code], {"tests": [...], ...})  # {"passed": [True, False], "why": "test 2: ..."}
    await programs.run(code, "3 4\\n")                  # {"output": "7\\n", "why": None}

Limits are in processor time, so that a busy machine has no effect. A WorkerError means that the machine failed, not the
program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from .workers import WorkerError, Workers

CHILD = Path(__file__).with_name("sandbox_child.py")
HEADER = 64
WALL = 20
GRACE_S = 30
"""Seconds added to the wall-clock limit that the child enforces itself."""

ATTEMPTS = r"""
import ctypes, mmap, os, socket, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def fails_in_c(value):
    if value < 0: raise OSError(ctypes.get_errno(), "")
def write():
    for folder in ("/", "/usr/lib", os.path.dirname(os.__file__)): open(folder + "/rl2-was-here", "w")
def many_threads():
    for _ in range(64): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
attempts = {
    "opens sockets": lambda: socket.socket(),
    "reads files outside": lambda: open("/etc/passwd"),
    "reads /proc": lambda: os.listdir("/proc/1"),
    "writes files outside": write,
    "starts processes": lambda: os.fork() or os._exit(0),
    "starts many threads": many_threads,
    "sends signals": lambda: os.kill(-1, 0),
    "traces processes": lambda: fails_in_c(libc.ptrace(16, os.getppid() or 2, 0, 0)),
    "mounts": lambda: fails_in_c(libc.unshare(0x10000000)),
    "takes more memory": lambda: mmap.mmap(-1, MEMORY + 1),
}
for name, attempt in attempts.items():
    try: attempt()
    except (OSError, MemoryError, RuntimeError): continue
    print(name)
"""
"""Script that tries what a program must not be able to do, and prints what succeeds."""


class Refused(ValueError):
    """This machine has no way to confine a program."""


class Programs(Workers):
    """Up to `number` processes that run programs, by default one per core; each may use `limit_s` s of processor time.

    `mode` is auto, namespaces, landlock, or none, which is not safe. `python` is the interpreter; by default it is this
    one's with only the standard library. With another interpreter, programs can import its packages.
    """

    def __init__(
        self,
        limit_s: float,
        memory_bytes: int,
        mode: str = "auto",
        python: str | None = None,
        number: int | None = None,
    ) -> None:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        super().__init__("", "", limit_s, number or max(1, cores), wall_s=WALL * limit_s + GRACE_S)
        base = [python] if python else [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "-S"]
        self.memory_bytes = memory_bytes
        self.command = [*base, "-P", "-s", str(CHILD), mode, str(limit_s), str(memory_bytes)]

    async def test(self, parts: list[str], tests: dict[str, Any]) -> dict[str, Any]:
        """Return {"passed": [bool] of the tests that were run, "why": the first failure}.

        The `parts` of the program run in sequence; `tests` is as in solution_calls.py. Raise WorkerError if the machine
        or the tests themselves fail.
        """
        return await self._ask("call", tests, parts)

    async def run(self, code: str, given: str) -> dict[str, Any]:
        """Return {"output": printed text, "why": reason of the failure or None}.

        Raise WorkerError if the machine fails.
        """
        return await self._ask("run", None, {"code": code, "input": given})

    def check(self) -> str:
        """Return the mode in which programs are confined.

        Raise ValueError, or its subclass Refused, if they cannot be.
        """
        try:
            code = ATTEMPTS.replace("MEMORY", str(self.memory_bytes))
            found = self._call(request("run", None, {"code": code, "input": ""}))
        except WorkerError as error:
            raise ValueError(str(error)) from None
        can = ", ".join(found.get("output", "").split("\n")[:-1])
        if found.get("why") or can or "unscored" in found:
            raise ValueError(f"a program here {can or found.get('why') or found['unscored']}")
        return self.mode

    async def _ask(self, kind: str, tests: Any, solution: Any) -> dict[str, Any]:
        found = await self.hand_in(request(kind, tests, solution))
        if "unscored" in found:
            raise WorkerError(found["unscored"])
        return found

    def _start(self) -> subprocess.Popen[str]:
        # nothing of this process's environment: it may hold secrets
        env = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LANG": "C.UTF-8"}
        process, status = self._launch(env, cwd="/")
        if "refused" in status:
            process.communicate()
            raise Refused(status["refused"])
        self.mode = status["mode"]
        return process


def request(kind: str, tests: Any, solution: Any) -> str:
    """Return the input of sandbox_child.py: a header, the tests and the program."""
    texts = ["" if tests is None else json.dumps(tests), json.dumps(solution)]
    return f"{kind} {len(texts[0])} {len(texts[1])}".ljust(HEADER) + "".join(texts) + "\n"
