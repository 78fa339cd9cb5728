"""Lock on the folder of a run, on local and shared file systems: at most one run writes there.

The folder `lock` holds one numbered file per owner; the highest number is the current owner's. A process that finds
that owner gone creates the next number. Only one process can do so, so nothing is taken from a live owner. An owner on
this machine is gone when its process is; an owner on another machine is gone when it has not touched its file for
`STALE_S`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from RL2.errors import ConfigError, UserError, first_line
from RL2.io import durable

FOLDER = "lock"
HEARTBEAT_S = 10.0
"""Interval at which an owner touches its file."""
STALE_S = 120.0
"""Time without a touch after which an owner on another machine counts as gone."""


class RunLock:
    """Lock of one process on one folder."""

    def __init__(self, save_dir: Path, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S) -> None:
        self.save_dir, self.folder = save_dir, save_dir / FOLDER
        self.heartbeat_s, self.stale_s = heartbeat_s, stale_s
        self.file: Path | None = None
        """File of this process while it is the owner."""
        self.ending = threading.Event()

    def acquire(self, say: Callable[[str], None] = lambda line: None) -> None:
        """Become the owner. Raise ConfigError if another process is, or if the folder cannot be written.

        Wait up to `stale_s` for a sign of life from an owner on another machine, and report that wait through `say`.
        """
        if (owner := _newest(self.folder)) is not None and _has_ended(owner) is False:
            raise _in_use(self.save_dir, owner)  # nothing was written yet
        own = self.folder / f"{secrets.token_hex(8)}.new"
        try:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            durable.write_text(own, json.dumps(_myself(), indent=1))
            while self.file is None:
                self._try(own, say)
        except OSError as error:
            raise ConfigError(f"trainer.save_dir={self.save_dir} cannot be written: {first_line(error)}") from error
        finally:
            with suppress(OSError):
                own.unlink()
        for older in _files(self.folder)[:-1]:
            older.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _try(self, own: Path, say: Callable[[str], None]) -> None:
        """Take over from the current owner if it is gone and no other process was faster."""
        owner = _newest(self.folder)
        try:
            if owner is not None and not self._is_gone(owner, own, say):
                raise _in_use(self.save_dir, owner)
        except FileNotFoundError:
            return  # another process has taken over
        file = self.folder / f"{_number(owner) + 1:06d}.json"
        if not _create(own, file):
            return
        if _newest(self.folder) == file:
            self.file = file
        else:  # the owner seen above was replaced, and the files of its successors are gone
            file.unlink(missing_ok=True)

    def refuse_if_lost(self) -> None:
        """Raise UserError if another process has taken over while this one stood still, or if the folder is gone."""
        if self.file is not None and _newest(self.folder) != self.file:
            raise UserError(
                f"trainer.save_dir={self.save_dir} no longer belongs to this run: it was removed, or another run "
                f"saw no sign of life for {self.stale_s:g} s and took it over; this run writes nothing more"
            )

    def release(self) -> None:
        """Release the lock; may be called more than once."""
        self.ending.set()
        if self.file is not None and _newest(self.folder) == self.file:
            with suppress(OSError):  # on a full disk, others still see that the process is gone
                durable.write_text(self.file, json.dumps(_myself() | {"ended": True}, indent=1))
        self.file = None

    def _beat(self) -> None:
        while not self.ending.wait(self.heartbeat_s):
            if self.file is not None:
                with suppress(OSError):  # the file may come back; writers call `refuse_if_lost`
                    os.utime(self.file)  # this sets the file server's time

    def _is_gone(self, owner: Path, own: Path, say: Callable[[str], None]) -> bool:
        """Return whether the owner has ended or died; watch an owner on another machine for up to `stale_s`."""
        first, began, told = _touched(owner), time.monotonic(), False
        while (ended := _has_ended(owner)) is None:
            os.utime(own)  # both times by the clock of the file server
            touched = _touched(owner)
            if touched != first:
                return False
            if _touched(own) - touched > self.stale_s or time.monotonic() - began > self.stale_s:
                return True
            if not told:
                say(f"{_who(owner)} may be using {self.save_dir}; waiting for a sign of life, up to {self.stale_s:g} s")
                told = True
            time.sleep(min(1.0, self.heartbeat_s / 4))
        return ended


def refuse_if_running(save_dir: Path) -> None:
    """Raise ConfigError if a run is using the folder. Write nothing and do not wait."""
    owner = _newest(save_dir / FOLDER)
    if owner is None:
        return
    ended = _has_ended(owner)
    if ended is None:
        ended = time.time() - _touched(owner) > STALE_S
    if not ended:
        raise _in_use(save_dir, owner)


def _in_use(save_dir: Path, owner: Path) -> ConfigError:
    return ConfigError(
        f"trainer.save_dir={save_dir} is in use by {_who(owner)}; wait until it ends, or choose another "
        "trainer.save_dir"
    )


def _who(owner: Path) -> str:
    found = _read(owner)
    return f"the run of process {found.get('pid')} on {found.get('host')}, begun {found.get('since')}"


def _has_ended(owner: Path) -> bool | None:
    """Return whether an owner is gone; None if it is on another machine, where its process cannot be seen."""
    found = _read(owner)
    if found.get("ended") is True:
        return True
    if found.get("machine") != _machine():
        return None
    started = _started(found.get("pid"))
    return started is None or started != found.get("started")


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "ended": False,
    }


def _machine() -> str:
    """Return an identifier of this boot of this machine and this container's process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: object) -> str | None:
    """Return the start time of a process, which tells it from later ones with its number; None if it is gone."""
    if type(pid) is not int or pid < 1:
        return None
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if after_name[0] in "ZX" else after_name[19]  # proc(5): state, starttime
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _create(own: Path, file: Path) -> bool:
    """Create `file` with the content of `own` atomically; return False if it exists."""
    try:
        os.link(own, file)
    except FileExistsError:
        return False
    except OSError:  # this file system has no hard links
        try:
            with file.open("x") as out:
                out.write(own.read_text())
        except FileExistsError:
            return False
    return True


def _files(folder: Path) -> list[Path]:
    return sorted((file for file in folder.glob("*.json") if file.stem.isdecimal()), key=_number)


def _newest(folder: Path) -> Path | None:
    return max(_files(folder), key=_number, default=None)


def _number(owner: Path | None) -> int:
    return 0 if owner is None else int(owner.stem)


def _touched(file: Path) -> float:
    """Return the file's modification time from the server; opening the file refreshes the cache of an NFS client."""
    with file.open() as content:
        return os.fstat(content.fileno()).st_mtime


def _read(file: Path) -> dict[str, Any]:
    """Return what an owner wrote about itself; empty if the file is damaged or gone."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
