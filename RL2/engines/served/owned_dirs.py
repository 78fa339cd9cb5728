"""Folders of a process that others remove when it has died without doing so."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from pathlib import Path

LOCK = "lock"
SHARED_MEMORY = Path("/dev/shm")
SHORT = Path("/tmp")
"""For sockets, whose paths may have 107 characters: a TMPDIR may be longer."""


class OwnFolder:
    """A new folder in `parent`, which has to be of this machine; those of processes that are dead are removed."""

    def __init__(self, parent: Path, prefix: str) -> None:
        for lock in parent.glob(f"{prefix}*/{LOCK}"):
            try:
                with lock.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ours now, so its owner is gone
                    shutil.rmtree(lock.parent, ignore_errors=True)
            except OSError:  # it is there, or another user's
                continue
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # held for as long as the process lives; it gets its name only then
        self.lock = (self.path / f"{LOCK}.partial").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        (self.path / f"{LOCK}.partial").rename(self.path / LOCK)

    def remove(self) -> None:
        """May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()
