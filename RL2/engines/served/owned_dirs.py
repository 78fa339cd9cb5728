"""Temporary directories that are removed even if their process is killed."""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from pathlib import Path

LOCK = "lock"
SHARED_MEMORY = Path("/dev/shm")
SHORT = Path("/tmp")
"""Parent of directories with sockets, whose paths are limited to 107 characters: $TMPDIR may be longer."""


class OwnedDir:
    """A new directory in `parent`, on a local file system; directories of dead processes are removed first."""

    def __init__(self, parent: Path, prefix: str) -> None:
        for lock in parent.glob(f"{prefix}*/{LOCK}"):
            try:
                with lock.open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # succeeds only if the owner is dead
                    shutil.rmtree(lock.parent, ignore_errors=True)
            except OSError:  # the owner is alive, or another user
                continue
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        # the file gets its name once it is locked, so no other process can lock it first
        self.lock = (self.path / f"{LOCK}.partial").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        (self.path / f"{LOCK}.partial").rename(self.path / LOCK)

    def remove(self) -> None:
        """Remove the directory; may be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()
