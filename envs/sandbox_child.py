"""Server that runs programs written by a model, each in a confined process; sandbox.py starts one per worker.

This process never reads a program or its tests: they go through its standard input directly to the processes that it
forks, so that no program finds the tests of another, or its own, in memory. For each request it forks a supervisor. The
supervisor forks the program ("solution") and, for tests that call it, a second process ("tests") in which no code of
the model runs. The tests request calls through a pipe, and only plain values (plain.py) come back.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = str(Path(__file__).resolve().parent)
sys.path.insert(0, FOLDER)
import sandbox_kernel as kernel  # noqa: E402
import solution_calls as calls  # noqa: E402

sys.path.remove(FOLDER)

FAILED = 70
"""Exit code of a process that fails before or after the model's code."""
MOST_FDS = 4096
HEADER = 64
"""Bytes of a request's header: the kind of request, and the lengths of tests and solution."""
MOST_OUTPUT = 1 << 20
"""Limit in bytes of what a program may print."""
MOST_VERDICT = 1 << 20
NO_MEMORY = json.dumps({"passed": [], "why": "its answers take more memory than there is"})
TICK_S = 0.1
IDLE = 2
"""Multiple of the limit of processor time for which a program may be idle."""
WALL = 20
"""Multiple of the limit of processor time after which a program without a processor is given up."""
COMMON = "array bisect cmath collections copy datetime decimal fractions functools heapq itertools math operator random"
COMMON += " re statistics string textwrap threading typing"
"""Modules that most programs import; loaded once."""


@dataclass(frozen=True)
class Server:
    lock: kernel.Lock
    limits: kernel.Limits
    proc: int
    """Descriptor of the machine's /proc; programs have no access to it."""


@dataclass
class Ended:
    """Exit status and processor time of an ended process."""

    status: int
    processor_s: float

    def is_too_slow(self, limits: kernel.Limits) -> bool:
        """Return whether the process was killed by its limit of processor time."""
        # the kernel counts ticks for the limit and time for the usage; they differ by a few per cent
        is_killed = os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL
        return is_killed and self.processor_s > limits.processor_s / 2

    def cause(self, limits: kernel.Limits) -> str | None:
        """Return the reason of the failure as text; None if the process ended normally."""
        if not os.WIFSIGNALED(self.status):
            code = os.waitstatus_to_exitcode(self.status)
            return f"ended with exit code {code}" if code else None
        if self.is_too_slow(limits):
            return f"took more than {limits.processor_s:g} s of processor time"
        return f"was ended by {signal.Signals(os.WTERMSIG(self.status)).name}"

    def is_killed_from_outside(self, limits: kernel.Limits) -> bool:
        """Return whether something other than its limits or itself killed it, such as a machine out of memory."""
        is_killed = os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL
        return is_killed and not self.is_too_slow(limits)


def main(mode: str, processor_s: float, memory_bytes: int) -> None:
    sys.path[:] = [os.path.realpath(path) for path in sys.path if os.path.exists(path)]
    for name in COMMON.split():
        __import__(name)
    import site  # for exit() and quit(), which -S leaves out

    site.setquit()
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY) if os.path.isdir("/proc") else -1
    try:
        lock = kernel.prepare(mode)
    except kernel.Refused as error:
        reply({"refused": str(error)})
        return
    server = Server(lock, kernel.Limits(processor_s, memory_bytes), proc)
    reply({"mode": lock.mode, "threads": lock.threads})
    while header := read_exactly(HEADER):
        kind, *sizes = header.split()
        supervisor = os.fork()
        if supervisor == 0:
            os._exit(supervise(server, kind.decode(), *map(int, sizes)))
        _, status = os.waitpid(supervisor, 0)
        if status:
            reply({"error": f"the supervisor ended with status {status}"})
        while os.read(0, 1) not in (b"\n", b""):  # the rest of a request that nobody read to its end
            pass


def supervise(server: Server, kind: str, tests_bytes: int, solution_bytes: int) -> int:
    """Answer one request, clean up, and return an exit code."""
    kernel.die_with_parent()
    fork = Fork(server)
    watch = Watch(server, fork.started)
    try:
        if server.lock.mode == "namespaces":
            kernel.unshare_pids()
        result, writer = os.pipe()
        if kind == "call":
            questions, answers = os.pipe(), os.pipe()
            # first process of the namespace: when it ends, the kernel ends the other
            fork(lambda: run_tests(tests_bytes, answers[0], questions[1], writer, fork))
            for fd in (answers[0], questions[1], writer):
                os.close(fd)
            fork(lambda: run_solution(solution_bytes, questions[0], answers[1], fork))
            os.write(answers[1], b"1")
            for fd in (questions[0], answers[1]):
                os.close(fd)
            value = called(watch, result)
        else:
            fork(lambda: run_program(solution_bytes, writer, fork))
            os.close(writer)
            value = ran(watch, result)
        answer: dict[str, Any] = {"value": value}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    watch.stop()
    reply(answer)
    return 0


class Fork:
    """Starter of the processes of one request; in them, `confine` locks them down."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.started: list[int] = []
        self.alive, self._alive_writer = os.pipe()
        self._ready = -1

    def __call__(self, run: Callable[[], int]) -> None:
        """Run a function in a new process and wait until it is locked down. Raise OSError if it cannot be."""
        reader, self._ready = os.pipe()
        process = os.fork()
        if process == 0:
            code = FAILED
            try:
                code = run()
            except Exception as error:
                with contextlib.suppress(OSError):
                    os.write(self._ready, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(code)
        self.started.append(process)
        os.close(self._ready)
        with open(reader, "rb") as file:
            status = file.read()
        if status != b"1":
            raise OSError(f"a process could not be locked down: {status.decode('utf-8', 'replace') or 'it ended'}")

    def confine(self, stdin: int, stdout: int, *kept: int) -> None:
        """Lock this process down; it keeps the given open files, with /dev/null in place of -1."""
        os.close(self._alive_writer)
        null = os.open("/dev/null", os.O_RDWR)
        for fd, place in ((stdin, 0), (stdout, 1), (-1, 2)):
            os.dup2(null if fd < 0 else fd, place)
        low = 3
        for fd in sorted((*kept, self.alive, self._ready)):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, MOST_FDS)
        kernel.confine(self.server.lock, self.server.limits)
        if select.select([self.alive], [], [], 0)[0]:  # the supervisor died before the parent-death signal was set
            os._exit(FAILED)
        os.close(self.alive)
        os.write(self._ready, b"1")
        os.close(self._ready)


def run_tests(size: int, answers: int, questions: int, result: int, fork: Fork) -> int:
    text = read_exactly(size)
    fork.confine(-1, -1, answers, questions, result)
    if os.read(answers, 1) != b"1":  # the solution's process could not be locked down
        return FAILED
    try:
        verdict = json.dumps(calls.run_tests(json.loads(text), answers, questions))
    except MemoryError:  # answers of the solution filled the memory
        verdict = NO_MEMORY
    write_all(result, verdict.encode())
    os.close(result)
    signal.pause()  # its end would end the solution, whose exit status may be needed
    return FAILED


def run_solution(size: int, questions: int, answers: int, fork: Fork) -> int:
    text = read_exactly(size)
    fork.confine(-1, -1, questions, answers)
    calls.serve(json.loads(text), questions, answers)
    return 0


def run_program(size: int, output: int, fork: Fork) -> int:
    """Run a program as `python main.py` would, with its input from memory."""
    request = json.loads(read_exactly(size))
    given = os.memfd_create("input")
    write_all(given, request["input"].encode("utf-8", "replace"))
    os.lseek(given, 0, os.SEEK_SET)
    fork.confine(given, output)
    for number, mode in enumerate(("r", "w", "w")):
        file = open(number, mode, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        setattr(sys, ("stdin", "stdout", "stderr")[number], file)
    sys.argv[:] = ["main.py"]
    module = sys.modules["__main__"] = ModuleType("__main__")
    code = 0
    try:
        exec(compile(request["code"], "main.py", "exec"), module.__dict__)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        code = 1
    sys.modules["threading"]._shutdown()
    sys.stdout.flush()
    return code & 255


class Watch:
    """Monitor of processes; it detects those that are idle or never get a processor."""

    def __init__(self, server: Server, processes: list[int]) -> None:
        self.server, self.processes = server, processes
        self.limits = server.limits
        self.ended: dict[int, Ended] = {}
        self.cause: str | None = None
        """Reason to stop the processes; None while there is none."""
        self.is_starved = False
        self._idle_s = 0.0
        self._start = self._last = time.monotonic()

    def read(self, pipe: int, most: int) -> bytes:
        """Return what `pipe` sends until it is closed, or until there is a reason to stop."""
        text = b""
        while not self.cause:
            if select.select([pipe], [], [], TICK_S)[0]:
                piece = os.read(pipe, 1 << 16)
                text += piece
                if not piece:
                    break
            if len(text) > most:
                self.cause = f"printed more than {most >> 20} MiB"
            self._look()
        return text[:most]

    def wait(self, process: int) -> None:
        """Wait for the end of a process, or for a reason to stop."""
        while not self.cause and process not in self.ended:
            self._reap(os.WNOHANG)
            self._look()
            time.sleep(0.001)

    def stop(self) -> None:
        """Kill the processes that have not ended."""
        self._reap(os.WNOHANG)
        for process in self.processes:
            if process not in self.ended:
                os.kill(process, signal.SIGKILL)
        self._reap(0)
        self.processes.clear()

    def _look(self) -> None:
        now, limit_s = time.monotonic(), self.limits.processor_s
        if now - self._last < TICK_S:
            return
        if not any(is_busy(self.server.proc, process) for process in self.processes if process not in self.ended):
            self._idle_s += now - self._last
        self._last = now
        if self._idle_s > IDLE * limit_s:
            self.cause = f"waited for more than {IDLE * limit_s:g} s"
        elif now - self._start > WALL * limit_s:
            self.cause, self.is_starved = f"had no processor for most of {WALL * limit_s:g} s", True

    def _reap(self, flags: int) -> None:
        for process in reversed(self.processes):  # the first can end only after the others
            if process not in self.ended:
                found, status, usage = os.wait4(process, flags)
                if found:
                    self.ended[process] = Ended(status, usage.ru_utime + usage.ru_stime)


def is_busy(proc: int, process: int) -> bool:
    """Return whether a thread of the process is running, ready to run, or waiting for a disk."""
    try:
        folder = os.open(f"{process}/task", os.O_RDONLY, dir_fd=proc)
    except OSError:  # unknown: there is no /proc, or it does not show all processes
        return True
    try:
        for thread in os.listdir(folder):
            with open(os.open(f"{thread}/stat", os.O_RDONLY, dir_fd=folder), "rb") as file:
                if file.read().rpartition(b") ")[2][:1] in b"RD":
                    return True
    except OSError:  # the thread has ended
        return True
    finally:
        os.close(folder)
    return False


def called(watch: Watch, pipe: int) -> dict[str, Any]:
    """Return the result of the tests: {"passed": [bool], "why"}, or {"unscored": cause}."""
    tests, solution = watch.processes
    text = watch.read(pipe, MOST_VERDICT)
    if watch.is_starved:
        return {"unscored": f"the program {watch.cause}"}
    if watch.cause:
        return {"passed": [], "why": f"the program {watch.cause}"}
    try:
        verdict = json.loads(text)
    except ValueError:
        watch.wait(tests)
        ended = watch.ended.get(tests, Ended(0, 0.0))
        cause = f"the process of its tests {ended.cause(watch.limits) or 'said nothing'}"
        if ended.is_killed_from_outside(watch.limits) or os.WIFEXITED(ended.status):
            return {"unscored": cause}
        return {"passed": [], "why": cause}
    if verdict.pop("died", False):
        watch.wait(solution)  # it may have closed its pipe and still run
        ended = watch.ended.get(solution, Ended(0, 0.0))
        cause = f"the program {watch.cause or ended.cause(watch.limits) or 'ended'}"
        if watch.is_starved or ended.is_killed_from_outside(watch.limits):
            return {"unscored": cause}
        verdict["why"] = cause
    return verdict


def ran(watch: Watch, pipe: int) -> dict[str, Any]:
    """Return the program's result: {"output", "why"} with `why` None if it succeeded, or {"unscored": cause}."""
    (program,) = watch.processes
    text = watch.read(pipe, MOST_OUTPUT)
    watch.wait(program)
    ended = watch.ended.get(program, Ended(0, 0.0))
    cause = watch.cause or ended.cause(watch.limits)
    if watch.is_starved or ended.is_killed_from_outside(watch.limits):
        return {"unscored": f"the program {cause}"}
    return {"output": text.decode("utf-8", "replace"), "why": f"the program {cause}" if cause else None}


def read_exactly(size: int) -> bytes:
    """Return `size` bytes of standard input, without reading ahead; fewer only at its end."""
    text = b""
    while len(text) < size and (piece := os.read(0, size - len(text))):
        text += piece
    return text


def write_all(fd: int, text: bytes) -> None:
    while text:
        text = text[os.write(fd, text) :]


def reply(value: dict[str, Any]) -> None:
    write_all(1, json.dumps(value).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
