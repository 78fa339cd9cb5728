"""Tables of data sets on this machine's disk: made once, by one process, and mapped by all.

A table has the name of what it is made of: the content of the data, the tokenizer, the settings and the code.
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
"""Environment variable that names the folder."""
FROM_BYTES = 4 * 2**20
"""Least size of data, in bytes, for which a table is written to the disk. Smaller data are read at each start."""
MOST_BYTES = 32 * 2**30
"""Limit of the size of all tables, in bytes; above it the least recently used ones are removed."""
WAIT_S = 3600.0
"""Limit of waiting for another process that makes the table."""
LOOK_S = 0.2
PARTIAL = ".partial"
"""Suffix of a table that is being written."""

Build = Callable[[Writer, Callable[[float], None]], Mapping[str, Any]]
"""Writes all rows, tells the share of the data that it has read, and returns what is said of them, as JSON."""


def folder() -> Path:
    """Return the folder of the tables: $RL2_CACHE, or rl2 in the user's folder for caches."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rl2"


def key(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    example: Callable[[Row], Row | None] | None,
    settings: Mapping[str, Any],
) -> str | None:
    """Return the name of a table.

    None: the table is not kept, as the data are small or as it is not known what the rows depend on.
    """
    try:
        if source.num_bytes < FROM_BYTES or not tokenizer.is_fast:
            return None
        code = "" if example is None else digest_of(example)
        if code is None or (content := source.content()) is None:
            return None
    except OSError:  # whoever reads it will say so
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
            # templates that write the date, such as Llama's, write another one tomorrow
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
    """Return the table called `name`: mapped from the disk, where `build` writes it now or has earlier.

    It is in memory if `name` is None, or if the disk does not take it, which is said. `bad` is then as `build` left it.
    """
    found = None
    if name is not None:
        try:
            found = _on_disk(folder() / name, bad, columns, build, progress, wait_s)
        except NotStorable:
            pass
        except OSError as error:
            progress.say(f"{bad.path}: kept in memory, as its table cannot be on the disk: {first_line(error)}")
    if found is None:
        writer = Writer(columns)
        with progress.phase(f"reading {bad.path}", 1) as phase:
            found = writer.finish(_built(bad, build, writer, phase.to))
    assert found is not None
    bad.restore(found.about["bad"])
    return found


def _built(bad: BadRows, build: Build, writer: Writer, tell: Callable[[float], None]) -> dict[str, Any]:
    """Build once more, perhaps after a disk was full; returns what is said of the rows."""
    bad.restore({})
    about = build(writer, tell)
    return {**about, "bad": bad.state()}


def _on_disk(
    place: Path, bad: BadRows, columns: Sequence[str], build: Build, progress: Progress, wait_s: float
) -> Table:
    """Map the table in `place`; write it first if it is not there, or damaged."""
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
                if not place.is_dir():  # if it is there, another machine was faster, where locks do not reach
                    raise
        finally:
            writer.abandon()
            shutil.rmtree(partial, ignore_errors=True)
        _prune(place)
        try:
            return open_table(place, columns)
        except ValueError as error:
            raise OSError(f"{place} is not as it was written ({error})") from error


def _ready(place: Path, columns: Sequence[str], progress: Progress) -> Table | None:
    """Return the table in `place`, if it is there; one that is damaged is removed."""
    if not place.is_dir():
        return None
    try:
        with progress.phase(f"checking {place}"):
            found = open_table(place, columns)
    except ValueError as error:
        progress.say(f"{place} is damaged ({error}); it is made again")
        shutil.rmtree(place)
        return None
    with suppress(OSError):
        os.utime(place)  # it was used
    return found


@contextmanager
def _locked(place: Path, what: str, progress: Progress, wait_s: float) -> Iterator[Callable[[float], None]]:
    """Be the only process of this machine that makes the table; others wait, and are told how far it is.

    Raises TimeoutError after `wait_s`.
    """
    with place.with_name(f"{place.name}.lock").open("a+") as file:
        end = time.monotonic() + wait_s
        with progress.phase(f"waiting for another process that reads {what}", 1) as phase:
            while not _lock(file):
                if time.monotonic() > end:
                    raise TimeoutError(f"another process has been at work on it for {wait_s:g} s")
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
    """Take the lock; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: two processes may make the same table, and one is kept
        pass
    return True


def _prune(newest: Path) -> None:
    """Remove the tables that were used longest ago until all fit, and what killed processes left behind."""
    for partial in newest.parent.glob(f"*{PARTIAL}"):
        if time.time() - max((_changed(file) for file in partial.iterdir()), default=0) > WAIT_S:
            shutil.rmtree(partial, ignore_errors=True)
    found = [place for place in newest.parent.iterdir() if (place / ABOUT).is_file() and not place.suffix]
    total = 0
    for place in sorted(found, key=lambda place: (place != newest, -_changed(place))):
        total += sum(file.stat().st_size for file in place.iterdir())
        if total > MOST_BYTES and place != newest:  # who has mapped it keeps it
            shutil.rmtree(place, ignore_errors=True)
            place.with_name(f"{place.name}.lock").unlink(missing_ok=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
