"""Rows of a file that cannot be used: all are looked at before the run stops, or goes on without them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from RL2.data.formats import canonical
from RL2.data.source import BadLine, DataError, Place, Row, Source, keys, shown

SHOWN = 5
"""Bad rows that an error quotes."""
PIECE = 1024
"""Number of rows in memory at a time, which bounds the memory that their encodings take."""
LONGEST = 160
"""Limit in characters of each row's message where several rows are bad."""


class FatalDataError(DataError):
    """A fault of every row, or one for which checking the other rows would take too long."""


class BadRows:
    """The rows of one file that cannot be used, by number from 0, each with what is wrong with it."""

    def __init__(self, path: str, *, skip: bool = False, key: str = "") -> None:
        """`skip`: the run goes on without them. `key`: the setting that says so, for the error."""
        self.path, self.skip, self.key = path, skip, key
        self.source = Source(path)
        self.found: dict[int, str] = {}
        self.total = 0
        """Rows that the file has."""
        self.formats = Counter[str]()
        """Rows by the format that they had; '' is our own."""
        self.left_out = 0
        """Rows that the script's `example` left out."""

    def state(self) -> dict[str, Any]:
        """Return what was found, as JSON."""
        return {
            "found": {str(number): error for number, error in self.found.items()},
            "total": self.total,
            "formats": self.formats,
            "left_out": self.left_out,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; an empty dict resets to the state before reading."""
        self.found = {int(number): error for number, error in state.get("found", {}).items()}
        self.total, self.left_out = state.get("total", 0), state.get("left_out", 0)
        self.formats = Counter(state.get("formats", {}))

    def load(self, example: Callable[[Row], Any] | None) -> dict[int, Row]:
        """Return all rows of `pieces`."""
        return {number: row for piece in self.pieces(example) for number, row in piece.items()}

    def pieces(
        self, example: Callable[[Row], Any] | None, tell: Callable[[float], None] = lambda share: None
    ) -> Iterator[dict[int, Row]]:
        """Yield the file's rows by number, each through an environment script's `example(row)` if there is one.

        Where that returns None the row is left out. Rows of a format that is known (data/formats.py) become our own.
        `tell` is told the share of the data that was read.
        """
        place, rows = Place(), dict[int, Row]()
        for number, row in enumerate(self.source.rows(place)):
            if number and number % PIECE == 0:
                yield rows
                tell(place.share)
                rows = {}
            self.total += 1
            with self.row(number):
                if isinstance(row, BadLine):
                    raise DataError(f"line {row.line}: {row}")
                converted = row if example is None else _converted(row, example)
                if converted is None:
                    self.left_out += 1
                else:
                    rows[number], name = canonical(converted)
                    self.formats[name] += 1
        yield rows

    @contextmanager
    def row(self, number: int) -> Iterator[None]:
        """Record what is wrong with row `number` if a DataError is raised within."""
        try:
            yield
        except FatalDataError as error:
            raise FatalDataError(f"{self.path}, row {number + 1}: {error}") from error
        except DataError as error:
            self.found[number] = str(error)

    def settle(self) -> None:
        """Raise DataError if rows are bad and the run is to stop at them, or if none is left."""
        if not self.found or (self.skip and len(self.found) + self.left_out < self.total):
            if self.left_out == self.total:
                raise DataError(f"{self.path}: example(row) leaves out all {self.total} rows")
            return
        numbers = sorted(self.found)
        if len(numbers) == 1:
            said = f"row {numbers[0] + 1}: {self.found[numbers[0]]}"
        else:
            said = "; ".join(f"row {number + 1}: {self.found[number]:.{LONGEST}}" for number in numbers[:SHOWN])
            more = f", the first {SHOWN} of them shown" if len(numbers) > SHOWN else ""
            said += f" ({len(numbers)} of {self.total} rows cannot be used{more})"
        if self.key and not self.skip:
            said += f"; {self.key}=skip goes on without such rows"
        raise DataError(f"{self.path}, {said}")

    def notes(self, listing: Path | None) -> list[str]:
        """Return what there is to say of rows that are left out; the bad ones are added to the file `listing`."""
        formats = (f"{number} as {name}" for name, number in self.formats.most_common() if name)
        said = [f"{self.path}: rows read {', '.join(formats)}"] if set(self.formats) - {""} else []
        if self.left_out:
            said.append(f"{self.path}: example(row) left out {self.left_out} of {self.total} rows")
        if self.found:
            where = "" if listing is None else f"; {listing} lists them"
            said.append(f"{self.path}: {len(self.found)} of {self.total} rows cannot be used and are skipped{where}")
            if listing is not None:
                with listing.open("a", encoding="utf-8") as file:
                    for number, error in sorted(self.found.items()):
                        file.write(json.dumps({"path": self.path, "row": number + 1, "error": error}) + "\n")
        return said


def load_converted(path: str, example: Callable[[Row], Any] | None) -> list[Row]:
    """Return all rows, converted, without those that `example` leaves out. Raise DataError if one cannot be used."""
    bad = BadRows(path)
    rows = bad.load(example)
    bad.settle()
    return list(rows.values())


def _converted(row: Row, example: Callable[[Row], Any]) -> Row | None:
    try:
        made = example(row)
    except DataError:
        raise
    except Exception as error:
        what = f"example(row) failed with {type(error).__name__}: {error}"
        raise DataError(f"{what}; the row's keys are {keys(row)}") from error
    if made is not None and not isinstance(made, dict):
        raise DataError(f"example(row) returned {shown(made)}, neither a dict nor None")
    return made
