"""Durable writes: after a power cut or a kill, files and folders hold either the old or the new content."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

ASIDE = ".old"
"""Suffix of a folder that is being replaced, on file systems that cannot swap two names."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder; they do it themselves
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush all files and names below `folder` to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def write_text(file: Path, text: str) -> None:
    """Replace the content of `file` atomically."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)
    sync(file.parent)


def replace_folder(new: Path, target: Path) -> None:
    """Rename the folder `new` to `target`, which may exist; readers find the old or the new one.

    Both must have the same parent. On a file system that cannot swap two names (NFS), `target` is absent between two
    renames; `recover` restores the old folder if the process dies there.
    """
    sync_tree(new)
    if not target.is_dir():
        new.rename(target)
    elif _exchange(new, target):
        remove(new)  # now the old one
    else:
        aside = target.with_name(target.name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
        new.rename(target)
        remove(aside)
    sync(target.parent)


def recover(target: Path) -> None:
    """Undo a replacement of `target` that was interrupted by a kill."""
    aside = target.with_name(target.name + ASIDE)
    if aside.is_dir() and not target.exists():
        aside.rename(target)


def remove(folder: Path) -> None:
    """Remove a folder; if the process is killed meanwhile, the rest has the suffix `.partial`."""
    partial = folder.with_name(f"{folder.name.removesuffix('.partial')}.partial")
    if folder != partial:
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
    shutil.rmtree(partial)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically. Return False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2  # Python has no binding for it
    except (AttributeError, OSError):
        return False
    return call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
