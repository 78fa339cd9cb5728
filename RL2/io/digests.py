"""Digests of the files of a folder, kept in the folder itself: a bit that flips on a disk or in a copy is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from RL2.io import durable

DIGESTS = "digests.json"
"""Path of each file, relative to the folder -> its SHA-256."""
THREADS = 4
"""Files that a process reads at the same time; hashing releases the interpreter's lock."""


def of_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return name -> SHA-256 in hexadecimal of the files `names` of `folder`."""
    names = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def write(folder: Path, digests: Mapping[str, str]) -> None:
    durable.write_text(folder / DIGESTS, json.dumps(dict(sorted(digests.items())), indent=1) + "\n")


def read(folder: Path, required: Iterable[str]) -> dict[str, str]:
    """Return the digests that were written into `folder`; they have to cover the files `required`.

    Raises ValueError if they are missing or damaged.
    """
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
    """Return what is wrong with the files of `folder` that `digests` names, a phrase each."""
    missing = [name for name in digests if not (folder / name).is_file()]
    try:
        found = of_files(folder, digests.keys() - set(missing))
    except OSError as error:
        return [f"{error.filename} cannot be read ({error.strerror})"]
    changed = [name for name in found if found[name] != digests[name]]
    return [f"{name} is missing" for name in missing] + [f"{name} is not as it was written" for name in changed]


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
