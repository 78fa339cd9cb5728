"""The end of a process in which C code that somebody else calls holds the interpreter: nothing can interrupt it."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

PATIENCE = 1.2
"""Limits of processor time after which code that should have been interrupted at the limit cannot be."""
MEMORY = 4 << 30
"""Bytes that the process may grow by while the same code runs."""
LOOKS = 20
"""Number of looks within one limit."""


class LastResort:
    """A process that watches this one, and kills it when the same piece of code has run for too long.

    It looks at the processor time that is spent: a process that was stopped, or that others keep from the processor,
    is not late. It ends with this process, or with this object.
    """

    def __init__(self, limit_s: float, words: str) -> None:
        """`words` are printed before the kill."""
        with tempfile.TemporaryFile() as file:
            file.truncate(mmap.PAGESIZE)
            self._shared = mmap.mmap(file.fileno(), mmap.PAGESIZE)
            self._watcher = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(file.fileno()), str(limit_s * PATIENCE), words],
                stdout=subprocess.DEVNULL,
                stdin=subprocess.PIPE,  # closed when this process or object is gone
                pass_fds=(file.fileno(),),
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )

    def now(self, number: int, running: int) -> None:
        """Say that `number` pieces have begun so far, of which `running` are under way."""
        struct.pack_into("qq", self._shared, 0, number, running)

    def __del__(self) -> None:
        watcher = getattr(self, "_watcher", None)
        if watcher is not None and watcher.stdin is not None:
            watcher.stdin.close()
            watcher.wait()


def watch(parent: int, shared: mmap.mmap, limit_s: float, words: str) -> None:
    """Kill `parent` when one piece of its code takes too long; return when it is gone or needs this no more."""
    import select
    import signal

    seen, begun_s, begun_bytes = b"", 0.0, 0
    while not select.select([0], [], [], limit_s / LOOKS)[0]:
        if os.getppid() != parent:
            return
        state = shared[:16]
        _, running = struct.unpack("qq", state)
        try:
            seconds, size = spent(parent)
        except (OSError, ValueError, IndexError):  # it is gone, or this system does not tell
            return
        if state != seen:
            seen, begun_s, begun_bytes = state, seconds, size
        elif running and (seconds - begun_s > limit_s or size - begun_bytes > MEMORY):
            sys.stderr.write(words + "\n")
            sys.stderr.flush()
            os.kill(parent, signal.SIGKILL)
            return


def spent(process: int) -> tuple[float, int]:
    """Return the processor time of a process in seconds, and its memory in bytes. Raise OSError if it is gone."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), pages * mmap.PAGESIZE


if __name__ == "__main__":
    watch(os.getppid(), mmap.mmap(int(sys.argv[1]), mmap.PAGESIZE), float(sys.argv[2]), sys.argv[3])
