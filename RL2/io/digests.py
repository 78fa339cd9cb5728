"""Digests of the files in a folder, stored beside them, to detect corruption on disk or in a copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from RL2.io import durable

DIGESTS = "digests.json"
"""Name of the file that maps each path, relative to the folder, to its SHA-256."""
THREADS = 4
"""Number of files that a process hashes at once; hashing releases the GIL."""


def compute(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return name -> hexadecimal SHA-256 for the files `names` of `folder`."""
    names = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def write(folder: Path, digests: Mapping[str, str]) -> None:
    """Store `digests`, path relative to `folder` -> SHA-256, in `folder`."""
    durable.write_text(folder / DIGESTS, json.dumps(dict(sorted(digests.items())), indent=1) + "\n")


def read(folder: Path, required: Iterable[str]) -> dict[str, str]:
    """Return the digests stored in `folder`. Raise ValueError if they are missing, damaged or incomplete."""
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{DIGESTS} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{DIGESTS} cannot be read ({type(error).__name__})") from error
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise ValueError(f"{DIGESTS} is not an object of strings")
    if missing := sorted(set(required) - digests.keys()):
        raise ValueError(f"{DIGESTS} has no {missing[0]}")
    return digests


def faults(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Return one phrase for each file named in `digests` that is missing, unreadable or changed."""
    missing = [name for name in digests if not (folder / name).is_file()]
    try:
        found = compute(folder, digests.keys() - set(missing))
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]
    changed = [name for name in found if found[name] != digests[name]]
    return [f"{name} is missing" for name in missing] + [f"{name} is not as it was written" for name in changed]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
