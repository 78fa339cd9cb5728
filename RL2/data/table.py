"""Tables of a data set's rows as flat arrays: in memory, or in files that processes map and share."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedWriter, BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from RL2.io import digests

ABOUT = "about.json"
"""File with the description of a table beside its columns."""
DTYPES: dict[str, type[np.generic]] = {"ids": np.int32, "trains": np.bool_, "row": np.int64, "good": np.bool_}
"""Column -> type of its values; other columns are bytes."""
STARTS = "starts"
T = TypeVar("T")


class NotStorable(ValueError):
    """A value that cannot be written to a file, so that the table must stay in memory."""


@dataclass(frozen=True)
class Ragged:
    """Arrays of different lengths, stored end to end."""

    values: np.ndarray
    starts: np.ndarray
    """int64 [rows + 1]: array i is values[starts[i] : starts[i + 1]]."""

    @staticmethod
    def from_rows(rows: Sequence[Sequence[int]], dtype: type[np.generic]) -> Ragged:
        """Return `rows` as arrays of `dtype`."""
        starts = np.cumsum([0, *map(len, rows)])
        return Ragged(np.fromiter(chain.from_iterable(rows), dtype, int(starts[-1])), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.values[self.starts[number] : self.starts[number + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)


@dataclass(frozen=True)
class Table:
    """Columns with the same number of rows."""

    columns: Mapping[str, Ragged]
    about: Mapping[str, Any]
    """Notes about all rows, as JSON data."""
    objects: Mapping[int, Any]
    """Row -> value that can only be held in memory."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


class TableView(Sequence[T], ABC):
    """Objects that are made from the rows of a table on access."""

    def __init__(self, table: Table) -> None:
        self.table = table

    @abstractmethod
    def item(self, number: int) -> T:
        """Return the object with the index `number`, counted from 0."""

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self.item(each) for each in range(*number.indices(len(self)))]
        return self.item(range(len(self))[number])


class Writer:
    """Writer of rows, piece by piece, into memory or a folder; with a folder, no rows stay in memory."""

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        self.names, self.folder = names, folder
        self.files: dict[str, BytesIO | BufferedWriter] = {}
        self.hashes = {name: hashlib.sha256() for name in (*names, *(f"{name}.{STARTS}" for name in names))}
        for name in self.hashes:
            self.files[name] = BytesIO() if folder is None else (folder / name).open("wb")
        self.ends = dict.fromkeys(names, 0)
        self.rows = 0
        self.objects: dict[int, Any] = {}
        for name in names:
            self._write(f"{name}.{STARTS}", np.zeros(1, np.int64))

    def add(self, **columns: Sequence[Sequence[int]] | Sequence[bytes]) -> None:
        """Append rows: the same number for each column, each row a list of numbers or bytes."""
        for name, rows in columns.items():
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            ends = self.ends[name] + lengths.cumsum()
            if name in DTYPES:
                self._write(name, np.fromiter(chain.from_iterable(rows), DTYPES[name], int(lengths.sum())))
            else:
                self._write(name, b"".join(rows))  # type: ignore[arg-type]
            self._write(f"{name}.{STARTS}", ends)
            self.ends[name] = int(ends[-1]) if len(ends) else self.ends[name]
        self.rows += len(next(iter(columns.values())))

    def keep(self, number: int, value: Any) -> None:
        """Store an object of row `number` in memory. Raise NotStorable if the table goes to a folder."""
        if self.folder is not None:
            raise NotStorable
        self.objects[number] = value

    def _in_memory(self, name: str, dtype: Any) -> np.ndarray:
        """Return the array that was written under `name`, without a copy."""
        file = self.files[name]
        assert isinstance(file, BytesIO)
        return np.frombuffer(file.getbuffer(), dtype)

    def finish(self, about: Mapping[str, Any]) -> Table | None:
        """Return the table; None if it was written to the folder, complete and with its digests."""
        if self.folder is None:
            columns = {}
            for name in self.names:
                values = self._in_memory(name, DTYPES.get(name, np.uint8))
                columns[name] = Ragged(values, self._in_memory(f"{name}.{STARTS}", np.int64))
            return Table(columns, about, self.objects)
        text = json.dumps(about).encode()
        (self.folder / ABOUT).write_bytes(text)
        self.close()
        found = {name: found.hexdigest() for name, found in self.hashes.items()}
        digests.write(self.folder, found | {ABOUT: hashlib.sha256(text).hexdigest()})
        return None

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def abandon(self) -> None:
        """Close the files that are still open, ignoring errors of a full disk."""
        for file in self.files.values():
            with suppress(OSError):
                file.close()

    def _write(self, name: str, data: Any) -> None:
        self.files[name].write(data)
        if self.folder is not None:
            self.hashes[name].update(data)


def open_table(folder: Path, names: Iterable[str]) -> Table:
    """Map the table in `folder`. Raise ValueError if it is incomplete or damaged, OSError if it cannot be read."""
    names = list(names)
    known = digests.read(folder, [ABOUT, *names, *(f"{name}.{STARTS}" for name in names)])
    if faults := digests.faults(folder, known):
        raise ValueError("; ".join(faults))
    about = json.loads((folder / ABOUT).read_bytes())
    columns = {
        name: Ragged(_mapped(folder / name, DTYPES.get(name, np.uint8)), _mapped(folder / f"{name}.{STARTS}", np.int64))
        for name in names
    }
    return Table(columns, about, {})


def _mapped(file: Path, dtype: type[np.generic]) -> np.ndarray:
    return np.memmap(file, dtype, "r") if file.stat().st_size else np.empty(0, dtype)


def is_json(value: Any) -> bool:
    """Return whether a JSON round trip gives back exactly this value, with the same types."""
    kind = type(value)
    if value is None or kind in (str, int, float, bool):
        return True
    if kind is list:
        return all(map(is_json, value))
    return kind is dict and all(type(key) is str for key in value) and all(map(is_json, value.values()))
