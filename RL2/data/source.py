"""Readers of rows: a local file, a folder saved by `datasets`, or a data set of the hub.

JSON and CSV are parsed here, so that an error can name the file, the row (from 1), the line and the fault.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from RL2.errors import UserError, one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

Row = dict[str, Any]

DEFAULT_SPLIT = "train"
"""Split of a data set that is named without one."""
AT_ONCE = 1024
"""Number of rows of an Arrow table in memory at a time."""


class DataError(UserError, ValueError):
    """An error in the data; the message names the file and the row."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class BadLine(DataError):
    """An error in a line of a file that could not be read as a row."""

    def __init__(self, line: int, text: str) -> None:
        self.line = line
        super().__init__(text)


@contextmanager
def in_row(path: str, row: int) -> Iterator[None]:
    """Add the file and the row number (from 0) to a DataError in the `with` block."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}, row {row + 1}: {error}") from error


@dataclass
class Place:
    """Progress of a reader."""

    share: float = 0.0
    """Share of the data that has been read, from 0 to 1."""


class Source:
    """A .json, .jsonl, .csv, .parquet or .arrow file, a folder saved by `datasets`, or `split@name:subset`.

    The last form names a hub data set or a local folder. `:subset` is optional; the default split is `train`.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @cached_property
    def is_file(self) -> bool:
        return _is_file(self.path)

    @cached_property
    def dataset(self) -> Dataset:
        """Data set of rows that are not in a single file."""
        return _load_dataset(self.path)

    @property
    def num_bytes(self) -> int:
        """Size of the files in bytes."""
        return sum(file.stat().st_size for file in self._files())

    def content(self) -> str | None:
        """Return a digest of all rows; None if they are not in files."""
        found, files = hashlib.sha256(), self._files()
        found.update(
            b"" if self.is_file else str(self.dataset._fingerprint).encode()
        )  # covers rows selected from the files
        for file in files:
            with file.open("rb") as content:
                found.update(file.suffix.encode() + hashlib.file_digest(content, "sha256").digest())
        return found.hexdigest() if files else None

    def rows(self, place: Place | None = None) -> Iterator[Row | BadLine]:
        """Yield all rows, and update `place`.

        A line that cannot be read as a row is yielded as BadLine, if the rows after it can still be read.
        """
        place, number = place or Place(), 0
        try:
            readers = _READERS[Path(self.path).suffix](self.path, place) if self.is_file else self._dataset_rows(place)
            for row in readers:
                number += 1
                yield row
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 at byte {error.start}") from error
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error
        if not number:
            raise DataError(f"{self.path}: no rows")

    def _files(self) -> list[Path]:
        if self.is_file:
            return [Path(self.path)]
        return [Path(each["filename"]) for each in self.dataset.cache_files]

    def _dataset_rows(self, place: Place) -> Iterator[Row]:
        number = len(self.dataset)
        for start in range(0, number, AT_ONCE):
            place.share = start / number
            yield from without_filled(self.dataset.select(range(start, min(start + AT_ONCE, number))).to_list())


def load_rows(path: str) -> list[Row]:
    """Return all rows of a file, folder or hub data set. Raise DataError if one of them cannot be read."""
    rows = list[Row]()
    for number, row in enumerate(Source(path).rows()):
        if isinstance(row, BadLine):
            raise DataError(f"{path}, row {number + 1} (line {row.line}): {row}")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Renamed:
    """Wrapper of `example` for rows with other column names; `columns` maps our name to theirs, or to None.

    A column mapped to None is removed, both from the row and from the result of `example`. A row that has none of the
    named columns raises DataError.
    """

    columns: Mapping[str, str | None]
    example: Callable[[Row], Row | None] | None

    def __call__(self, row: Row) -> Row | None:
        theirs = {name: ours for ours, name in self.columns.items() if name is not None}
        if theirs and not theirs.keys() & row.keys():
            raise DataError(f"no column {' or '.join(map(repr, theirs))}; its columns are {keys(row)}")
        kept = {name: value for name, value in row.items() if name not in self.columns and name not in theirs}
        kept |= {ours: row[name] for name, ours in theirs.items() if name in row}
        converted = kept if self.example is None else self.example(kept)
        if not isinstance(converted, dict):
            return converted
        return {name: value for name, value in converted.items() if self.columns.get(name, name) is not None}


def with_columns(
    columns: Mapping[str, str | None], example: Callable[[Row], Row | None] | None
) -> Callable[[Row], Row | None] | None:
    """Return `example` for rows with renamed columns, see `Renamed`; without `columns`, return it unchanged."""
    return Renamed(columns, example) if columns else example


_JSON_BEGINS = frozenset('{["-0123456789tfnNI')
"""First characters of all JSON texts that Python reads; other texts need no attempt."""


def from_json(value: Any) -> Any:
    """Return `value`, decoded if it is a JSON string; CSV can hold lists and objects only this way."""
    if isinstance(value, str) and value.lstrip()[:1] in _JSON_BEGINS:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):  # not JSON, or not readable by Python
            pass
    return value


def keys(row: Row) -> str:
    """Return the keys of a row for error messages."""
    return ", ".join(map(str, row)) or "none"


def shown(value: Any) -> str:
    """Return the beginning of a value's repr, for error messages."""
    try:
        return f"{value!r:.60}"
    except (ValueError, RecursionError):  # a number with too many digits, or deeply nested lists
        return f"a {type(value).__name__}"


def describe(path: str | None) -> str:
    """Describe what `load_rows(path)` would read, without reading it.

    None means that the environment makes the tasks.
    """
    if path is None:
        return "none, the environment generates the tasks"
    if _is_file(path):
        return f"{path}: {Path(path).suffix[1:]} file, {_size(Path(path).stat().st_size)}"
    if _is_saved(Path(path)):
        return f"{path}: folder saved by datasets"
    split, name, subset = _parse(path)
    where = "folder" if Path(name).is_dir() else "hub data set"
    return f"{path}: {where} {name}, " + (f"subset {subset}, " if subset else "") + f"split {split}"


def is_here(path: str | None) -> bool:
    """Return whether `load_rows(path)` would read from this machine and not from the hub."""
    return path is None or _is_file(path) or Path(_parse(path)[1]).exists()


def _is_file(path: str) -> bool:
    """Return True for a readable file, False for data that `datasets` loads. Raise DataError otherwise."""
    place = Path(path)
    if place.is_file() or (place.suffix in _READERS and "@" not in path):
        if not place.exists():
            raise DataError(f"{path}: there is no such file")
        if place.suffix not in _READERS:
            raise DataError(f"{path}: unknown suffix {place.suffix!r}; known are {', '.join(_READERS)}")
        return True
    if "@" in path or place.is_dir() or _HUB_NAME.fullmatch(path):
        return False
    raise DataError(f"{path}: there is no such file, and it is not a valid name of a hub data set")


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def _read_json(path: str, place: Place) -> Iterator[Row | BadLine]:
    # element by element instead of json.load, so that an error can name the row
    text = Path(path).read_text(encoding="utf-8-sig")
    decode, number = json.JSONDecoder().raw_decode, 0

    def wrong(what: str, position: int) -> DataError:
        line = text.count("\n", 0, position) + 1
        return DataError(f"{path}, row {number + 1} (line {line}): {what}")

    at = _skip_space(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        raise DataError(f"{path}: not an array of objects; for one object per line, name the file .jsonl")
    at = _skip_space(text, at + 1)
    while text[at : at + 1] != "]":
        if number:
            if text[at : at + 1] != ",":
                raise wrong("expected ',' before it, or ']'", at)
            at = _skip_space(text, at + 1)
        try:
            value, end = decode(text, at)
        except json.JSONDecodeError as error:
            raise wrong(error.msg, error.pos) from error
        except (ValueError, RecursionError) as error:
            raise wrong(_beyond(error), at) from error
        is_row = isinstance(value, dict)
        yield value if is_row else BadLine(text.count("\n", 0, at) + 1, _not_an_object(value))
        number += 1
        at = _skip_space(text, end)
        place.share = at / len(text)
    if _skip_space(text, at + 1) != len(text):
        raise DataError(f"{path}: more text after the end of the array")


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _not_an_object(value: Any) -> str:
    try:
        return f"expected an object, found {json.dumps(value):.40}"
    except RecursionError as error:
        return _beyond(error)


def _beyond(error: Exception) -> str:
    """Describe why Python cannot read valid JSON."""
    if isinstance(error, RecursionError):
        return "lists or objects are nested too deeply"
    return "a number has too many digits"


def _read_jsonl(path: str, place: Place) -> Iterator[Row | BadLine]:
    with open(path, "rb") as file:
        at, size = 0, os.fstat(file.fileno()).st_size
        for line, data in enumerate(file, 1):
            row: Row | BadLine | None = None
            try:
                text = data.decode("utf-8-sig" if line == 1 else "utf-8")
                if text.strip():
                    value = json.loads(text)
                    row = value if isinstance(value, dict) else BadLine(line, _not_an_object(value))
            except UnicodeDecodeError as error:
                row = BadLine(line, f"not UTF-8 at byte {at + error.start}")
            except json.JSONDecodeError as error:
                row = BadLine(line, f"{error.msg} (column {error.colno})")
            except (ValueError, RecursionError) as error:
                row = BadLine(line, _beyond(error))
            at += len(data)
            if row is not None:
                place.share = at / size
                yield row


def _read_csv(path: str, place: Place) -> Iterator[Row | BadLine]:
    number = 0
    with open(path, "rb") as data, io.TextIOWrapper(data, encoding="utf-8-sig", newline="") as file:
        size = os.fstat(data.fileno()).st_size
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise DataError(f"{path}: two columns have the same name: {', '.join(header)}")
            for fields in filter(None, reader):
                number += 1
                place.share = data.tell() / size
                if len(fields) == len(header):
                    yield dict(zip(header, fields, strict=True))
                else:
                    said = f"{len(fields)} fields, the header has {len(header)}"
                    yield BadLine(reader.line_num, said)
        except csv.Error as error:
            raise DataError(f"{path}, row {number + 1} (line {reader.line_num}): {error}") from error


TOOL_KEYS = ("tools", "tool_calls")


def without_filled(value: Any, *, in_tools: bool = False) -> Any:
    """Return `value` without null keys inside of tools and tool calls.

    Arrow gives each object the keys of all objects in its column: another call's argument would train as null.
    """
    if isinstance(value, list):
        return [without_filled(each, in_tools=in_tools) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: without_filled(each, in_tools=in_tools or key in TOOL_KEYS)
        for key, each in value.items()
        if each is not None or not in_tools
    }


# pyarrow and datasets take seconds to import, so they are imported only where needed


def _read_parquet(path: str, place: Place) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pa.parquet.ParquetFile(path) as file:
            yield from _rows_of(file.iter_batches(AT_ONCE), file.metadata.num_rows, place)
    except pa.ArrowException as error:
        raise DataError(f"{path}: {error}") from error


def _read_arrow(path: str, place: Place) -> Iterator[Row]:
    import pyarrow as pa

    with open(path, "rb") as file:
        is_stream = file.read(6) != b"ARROW1"
    try:
        with pa.memory_map(path) as source:
            reader = pa.ipc.open_stream(source) if is_stream else pa.ipc.open_file(source)
            table = reader.read_all()
            yield from _rows_of(table.to_batches(AT_ONCE), table.num_rows, place)
    except pa.ArrowException as error:
        raise DataError(f"{path}: {error}") from error


def _rows_of(batches: Iterable[RecordBatch], number: int, place: Place) -> Iterator[Row]:
    """Yield the rows of validated batches and update `place`; `number` is the total of rows."""
    done = 0
    for batch in batches:
        batch.validate(full=True)  # a damaged file's lengths would be read beyond its end
        yield from without_filled(batch.to_pylist())
        done += batch.num_rows
        place.share = done / number


_READERS: dict[str, Callable[[str, Place], Iterator[Row | BadLine]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[^/]+)?")
"""Pattern of OWNER/NAME:SUBSET; OWNER and SUBSET are optional."""


def _parse(path: str) -> tuple[str, str, str | None]:
    """Split `split@name:subset`; the default split is `train`."""
    if "@" not in path and Path(path).exists():
        return DEFAULT_SPLIT, path, None
    split, _, rest = path.partition("@") if "@" in path else (DEFAULT_SPLIT, "", path)
    name, _, subset = rest.partition(":")
    if not split or not name:
        raise DataError(f"{path}: write split@name or split@name:subset")
    return split, name, subset or None


def _is_saved(folder: Path) -> bool:
    """Return whether the folder was written by `save_to_disk` of `datasets`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_dataset(path: str) -> Dataset:
    import datasets

    split, name, subset = _parse(path)
    try:
        if _is_saved(Path(name)):
            data = datasets.load_from_disk(name)
        else:
            data = datasets.load_dataset(name, subset, split=split)
    # network, names, scripts, files: for any error the user needs the data set and the reason
    except Exception as error:
        raise DataError(f"{path}: {type(error).__name__}: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            hint = ", ".join(f"{known}@{name}" for known in data)
            raise DataError(f"{path}: it has no split {split!r}; write {hint}")
        data = data[split]
    elif "@" in path and _is_saved(Path(name)):
        raise DataError(f"{path}: this folder holds one data set without splits; write {name}")
    return data
