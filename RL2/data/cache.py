"""Cache of tokenized data sets on this machine's disk: one process writes a table, all processes map it.

The name of a table is a digest of everything it depends on: the data, the tokenizer, the settings and the code.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import BadRows
from RL2.data.pure import digest_of
from RL2.data.source import Row, Source
from RL2.data.table import ABOUT, NotStorable, Table, Writer, open_table
from RL2.errors import first_line
from RL2.io.progress import Progress

FOLDER = "RL2_CACHE"
"""Environment variable with the path of the cache folder."""
FROM_BYTES = 4 * 2**20
"""Smallest size of data in bytes that is cached. Smaller data are read at each start."""
MOST_BYTES = 32 * 2**30
"""Limit of the cache's size in bytes; above it the least recently used tables are removed."""
WAIT_S = 3600.0
"""Maximum wait in seconds for another process that is writing the table."""
LOOK_S = 0.2
PARTIAL = ".partial"
"""Suffix of a table that is being written."""

Build = Callable[[Writer, Callable[[float], None]], Mapping[str, Any]]
"""Function that writes all rows, reports the share of the data read, and returns notes about the rows as JSON data."""


def folder() -> Path:
    """Return the cache folder: `$RL2_CACHE`, or `rl2` in the user's cache folder."""
    if path := os.environ.get(FOLDER):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl2"


def key(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[Row], Row | None] | None,
    settings: Mapping[str, Any],
) -> str | None:
    """Return the name of a table; None if the table must not be cached.

    It is not cached if the data are small or if its dependencies cannot be determined.
    """
    try:
        if source.num_bytes < FROM_BYTES or not tokenizer.is_fast:
            return None
        code = "" if example is None else digest_of(example)
        if code is None or (content := source.content()) is None:
            return None
    except OSError:  # reading the data reports the error
        return None
    own = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        own.update(file.read_bytes())
    parts = {
        "data": content,
        "code": [own.hexdigest(), code, transformers.__version__, tokenizers.__version__, version("jinja2")],
        "tokenizer": [
            type(tokenizer).__qualname__,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            # a template that writes today's date, such as Llama's, gives another text tomorrow
            datetime.date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else "",
            {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            tokenizer.split_special_tokens,
        ],
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def table(
    bad: BadRows,
    name: str | None,
    columns: Sequence[str],
    build: Build,
    progress: Progress,
    wait_s: float = WAIT_S,
) -> Table:
    """Return the table called `name`, mapped from the disk; `build` writes it first if it is not there.

    The table stays in memory if `name` is None or if the disk cannot hold it. `bad` is restored to the state in which
    `build` left it.
    """
    found = None
    if name is not None:
        try:
            found = _on_disk(folder() / name, bad, columns, build, progress, wait_s)
        except NotStorable:
            pass
        except OSError as error:
            progress.say(
                f"{bad.path}: kept in memory, because its table cannot be written to disk: {first_line(error)}"
            )
    if found is None:
        writer = Writer(columns)
        with progress.phase(f"reading {bad.path}", 1) as phase:
            found = writer.finish(_built(bad, build, writer, phase.to))
    assert found is not None
    bad.restore(found.about["bad"])
    return found


def _built(bad: BadRows, build: Build, writer: Writer, tell: Callable[[float], None]) -> dict[str, Any]:
    """Run `build` from a clean state and return its notes; a second call may follow a full disk."""
    bad.restore({})
    about = build(writer, tell)
    return {**about, "bad": bad.state()}


def _on_disk(
    place: Path, bad: BadRows, columns: Sequence[str], build: Build, progress: Progress, wait_s: float
) -> Table:
    """Map the table in `place`; write it first if it is missing or damaged."""
    if (found := _ready(place, columns, progress)) is not None:
        return found
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(place, bad.path, progress, wait_s) as tell:
        if (found := _ready(place, columns, progress)) is not None:
            return found
        partial = place.with_name(f"{place.name}.{secrets.token_hex(4)}{PARTIAL}")
        partial.mkdir()
        writer = Writer(columns, partial)
        try:
            with progress.phase(f"reading {bad.path}", 1) as phase:

                def told(share: float) -> None:
                    phase.to(share)
                    tell(share)

                writer.finish(_built(bad, build, writer, told))
            try:
                partial.rename(place)
            except OSError:
                if not place.is_dir():  # it exists: another machine was faster, where locks do not reach
                    raise
        finally:
            writer.abandon()
            shutil.rmtree(partial, ignore_errors=True)
        _prune(place)
        try:
            return open_table(place, columns)
        except ValueError as error:
            raise OSError(f"{place} changed after it was written ({error})") from error


def _ready(place: Path, columns: Sequence[str], progress: Progress) -> Table | None:
    """Return the table in `place` if it exists; remove it if it is damaged."""
    if not place.is_dir():
        return None
    try:
        with progress.phase(f"checking {place}"):
            found = open_table(place, columns)
    except ValueError as error:
        progress.say(f"{place} is damaged ({error}); writing it again")
        shutil.rmtree(place)
        return None
    with suppress(OSError):
        os.utime(place)  # mark it as used
    return found


@contextmanager
def _locked(place: Path, what: str, progress: Progress, wait_s: float) -> Iterator[Callable[[float], None]]:
    """Hold the lock on writing a table and yield a function that reports progress to waiting processes.

    Raise TimeoutError after `wait_s`.
    """
    with place.with_name(f"{place.name}.lock").open("a+") as file:
        end = time.monotonic() + wait_s
        with progress.phase(f"waiting for another process that reads {what}", 1) as phase:
            while not _lock(file):
                if time.monotonic() > end:
                    raise TimeoutError(f"another process has been writing it for {wait_s:g} s")
                file.seek(0)
                with suppress(ValueError):
                    phase.to(float(file.read() or 0))
                time.sleep(LOOK_S)

        def tell(share: float) -> None:
            file.truncate(0)
            file.write(f"{share:.3f}")
            file.flush()

        tell(0)
        yield tell


def _lock(file: TextIO) -> bool:
    """Take the lock. Return False if another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # without locks, two processes may write the same table; one is kept
        pass
    return True


def _prune(newest: Path) -> None:
    """Remove the least recently used tables until all fit, and the remains of killed processes."""
    for partial in newest.parent.glob(f"*{PARTIAL}"):
        if time.time() - max((_changed(file) for file in partial.iterdir()), default=0) > WAIT_S:
            shutil.rmtree(partial, ignore_errors=True)
    found = [place for place in newest.parent.iterdir() if (place / ABOUT).is_file() and not place.suffix]
    total = 0
    for place in sorted(found, key=lambda place: (place != newest, -_changed(place))):
        total += sum(file.stat().st_size for file in place.iterdir())
        if total > MOST_BYTES and place != newest:  # processes that have mapped it keep it
            shutil.rmtree(place, ignore_errors=True)
            place.with_name(f"{place.name}.lock").unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
