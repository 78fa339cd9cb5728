"""Process that starts agents, one process for each episode, and leaves nothing of them behind.

    python host.py [FILE]

reads a JSON object a line: {"id", "argv" | "function", "env", "cwd", "log"} starts an agent, {"id", "kill": true} ends
one. It writes {"id", "status"} when an agent has ended and its whole process group with it: the exit status, or minus
the signal. Agents are forked from this process, which has imported what FILE imports, so that a function starts in
milliseconds and in a fresh state. When standard input ends, all agents are killed. It uses the standard library alone.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
RESULT = "reward.json"
"""File in an episode's folder with its reward."""
MARK = "RL2_EPISODE"
"""Environment variable of everything that an agent starts; its value is the episode."""


def import_ahead(file: Path) -> None:
    """Import the libraries that a Python file imports, without its own code. Ignore those that cannot be imported."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (OSError, ValueError, SyntaxError):
        return  # loading the file says why
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    for name in names:
        top = name.partition(".")[0]
        if not any((file.parent / own).exists() for own in (top, f"{top}.py")):  # code of the agent's own
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def start(order: dict[str, Any]) -> int:
    """Start the agent of an order in a session of its own; return its process."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.set_wakeup_fd(-1)  # its number will be that of a file or a connection of the agent
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.closerange(3, 4096)
        os.chdir(order["cwd"])
        os.environ.clear()
        os.environ.update(order["env"])
        if "argv" in order:
            os.execvp(order["argv"][0], order["argv"])
        call(order["function"], order["task"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(status)


def call(function: str, task: dict[str, Any]) -> None:
    """Call `path.py:name` with the task, and write what it returns into the episode's folder, unless it is None."""
    path, _, name = function.rpartition(":")
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    result = getattr(module, name)(task)
    if inspect.isawaitable(result):
        import asyncio

        async def wait() -> Any:
            return await result

        result = asyncio.run(wait())
    if result is not None:
        partial = Path(f"{RESULT}.partial")
        partial.write_text(json.dumps(result))
        partial.rename(RESULT)


def kill(process: int, order: dict[str, Any]) -> None:
    """Kill an agent's group and every process that it has started, even in sessions of their own."""
    _kill(_descendants(process))  # while it lives, their parents tell whose they are
    for _ in range(3):  # a process may start another one meanwhile
        for end in (os.killpg, os.kill):  # it may not lead its group yet
            with contextlib.suppress(OSError):
                end(process, signal.SIGKILL)
        found = [each for each in _descendants() if _belongs(each, order)]
        _kill(found)
        if not found:
            return


def _kill(processes: list[int]) -> None:
    for each in processes:
        with contextlib.suppress(OSError):
            os.kill(each, signal.SIGKILL)


def _belongs(process: int, order: dict[str, Any]) -> bool:
    """Return whether a process comes from the agent of `order`: by its environment, its folder or its output."""
    here = Path("/proc", str(process))
    with contextlib.suppress(OSError):
        mark = f"{MARK}={order['env'][MARK]}".encode()
        if mark in (here / "environ").read_bytes().split(b"\0") or os.readlink(here / "cwd").startswith(order["cwd"]):
            return True
        return order["log"] in (os.readlink(here / "fd" / "1"), os.readlink(here / "fd" / "2"))
    return False


def _descendants(of: int | None = None) -> list[int]:
    """Return all descendants of a process that are alive; of this one also those whose parents have ended."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state, parent = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(name))
    found, left = [], [os.getpid() if of is None else of]
    while left:
        children = parents.get(left.pop(), [])
        found += children
        left += children
    return found


def _ended() -> Iterator[tuple[int, int]]:
    """Yield each child that has ended and its status."""
    with contextlib.suppress(ChildProcessError):  # there is none
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def serve(replies: TextIO) -> None:
    """Start and kill agents as ordered until standard input ends; write to `replies` which have ended."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer ends its agents itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, dict[str, Any]] = {}
    pending = b""
    try:
        while True:
            ready, _, _ = select.select([0, wake], [], [], 1.0)
            if wake in ready:
                os.read(wake, 4096)
            if 0 in ready:
                data = os.read(0, 1 << 16)
                if not data:
                    return
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    if "kill" not in order:
                        running[start(order)] = order
                        continue
                    for process, started in running.items():
                        if started["id"] == order["id"]:
                            kill(process, started)
            for process, status in _ended():
                if process in running:  # others were left to this process by an agent
                    order = running.pop(process)
                    kill(process, order)
                    message = {"id": order["id"], "status": os.waitstatus_to_exitcode(status)}
                    print(json.dumps(message), file=replies, flush=True)
    finally:
        for process, order in running.items():
            kill(process, order)
        _kill(_descendants())


if __name__ == "__main__":
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some libraries print when they are imported
    if sys.argv[1:]:
        import_ahead(Path(sys.argv[1]))
    print(json.dumps({"ready": True}), file=messages, flush=True)
    serve(messages)
