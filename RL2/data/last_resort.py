"""Kill switch for a process whose C code holds the GIL, which nothing inside the process can interrupt."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

PATIENCE = 1.2
"""Multiple of the limit, in processor time, after which code counts as uninterruptible."""
MEMORY = 4 << 30
"""Bytes by which the process may grow while the same code runs."""
LOOKS = 20
"""Number of checks per limit."""


class LastResort:
    """Watcher process that kills this one if one piece of code runs for too long.

    It measures processor time, so a process that was stopped or starved is not late. It ends with this process or this
    object.
    """

    def __init__(self, limit_s: float, words: str) -> None:
        """Start the watcher; it prints `words` before the kill."""
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
        """Report that `number` pieces have begun so far, of which `running` are still running."""
        struct.pack_into("qq", self._shared, 0, number, running)

    def __del__(self) -> None:
        watcher = getattr(self, "_watcher", None)
        if watcher is not None and watcher.stdin is not None:
            watcher.stdin.close()
            watcher.wait()


def watch(parent: int, shared: mmap.mmap, limit_s: float, words: str) -> None:
    """Kill `parent` when one piece of its code exceeds the limit; return when it is gone or closes stdin."""
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
        except (OSError, ValueError, IndexError):  # the process is gone, or this system has no /proc
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
