"""Collection of unusable rows: a file is read to its end before the run stops or skips them."""

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
"""Number of bad rows that an error quotes."""
PIECE = 1024
"""Number of rows in memory at a time; bounds the memory of their encodings."""
LONGEST = 160
"""Limit in characters of each row's message when several rows are bad."""


class FatalDataError(DataError):
    """An error that affects every row, or after which checking the other rows would take too long."""


class BadRows:
    """Unusable rows of one file: row number from 0 -> error message."""

    def __init__(self, path: str, *, skip: bool = False, key: str = "") -> None:
        """Set up an empty collection for the file `path`.

        With `skip` the run continues without bad rows. `key` is the setting that enables it, for the error.
        """
        self.path, self.skip, self.key = path, skip, key
        self.source = Source(path)
        self.found: dict[int, str] = {}
        self.total = 0
        """Number of rows in the file."""
        self.formats = Counter[str]()
        """Number of rows per input format; the empty name is the library's own format."""
        self.left_out = 0
        """Number of rows for which the script's `example` returned None."""

    def state(self) -> dict[str, Any]:
        """Return the state as JSON-serialisable data."""
        return {
            "found": {str(number): error for number, error in self.found.items()},
            "total": self.total,
            "formats": self.formats,
            "left_out": self.left_out,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; an empty dict resets to the state before reading."""
        self.found = {int(number): error for number, error in state.get("found", {}).items()}
        self.total, self.left_out = state.get("total", 0), state.get("left_out", 0)
        self.formats = Counter(state.get("formats", {}))

    def load(self, example: Callable[[Row], Any] | None) -> dict[int, Row]:
        """Return all rows of `pieces` in one dict."""
        return {number: row for piece in self.pieces(example) for number, row in piece.items()}

    def pieces(
        self, example: Callable[[Row], Any] | None, tell: Callable[[float], None] = lambda share: None
    ) -> Iterator[dict[int, Row]]:
        """Yield the file's rows by number, piece by piece, converted by `example` if it is given.

        Rows for which `example` returns None are left out. Rows in a known format (data/formats.py) are converted to
        the library's own. `tell` receives the share of the data that was read.
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
        """Record a DataError in the `with` block as the error of row `number`."""
        try:
            yield
        except FatalDataError as error:
            raise FatalDataError(f"{self.path}, row {number + 1}: {error}") from error
        except DataError as error:
            self.found[number] = str(error)

    def settle(self) -> None:
        """Raise DataError if rows are bad and the run must stop at them, or if no row is left."""
        if not self.found or (self.skip and len(self.found) + self.left_out < self.total):
            if self.left_out == self.total:
                raise DataError(f"{self.path}: example(row) leaves out all {self.total} rows")
            return
        numbers = sorted(self.found)
        if len(numbers) == 1:
            text = f"row {numbers[0] + 1}: {self.found[numbers[0]]}"
        else:
            text = "; ".join(f"row {number + 1}: {self.found[number]:.{LONGEST}}" for number in numbers[:SHOWN])
            more = f", the first {SHOWN} of them shown" if len(numbers) > SHOWN else ""
            text += f" ({len(numbers)} of {self.total} rows cannot be used{more})"
        if self.key and not self.skip:
            text += f"; {self.key}=skip continues without such rows"
        raise DataError(f"{self.path}, {text}")

    def notes(self, listing: Path | None) -> list[str]:
        """Return lines about the rows that were converted or left out; append the bad rows to the file `listing`."""
        formats = (f"{number} as {name}" for name, number in self.formats.most_common() if name)
        lines = [f"{self.path}: rows read {', '.join(formats)}"] if set(self.formats) - {""} else []
        if self.left_out:
            lines.append(f"{self.path}: example(row) left out {self.left_out} of {self.total} rows")
        if self.found:
            where = "" if listing is None else f"; {listing} lists them"
            lines.append(f"{self.path}: {len(self.found)} of {self.total} rows cannot be used and are skipped{where}")
            if listing is not None:
                with listing.open("a", encoding="utf-8") as file:
                    for number, error in sorted(self.found.items()):
                        file.write(json.dumps({"path": self.path, "row": number + 1, "error": error}) + "\n")
        return lines


def load_converted(path: str, example: Callable[[Row], Any] | None) -> list[Row]:
    """Return all rows of a file, converted by `example`. Raise DataError if a row cannot be used.

    Rows for which `example` returns None are left out.
    """
    bad = BadRows(path)
    rows = bad.load(example)
    bad.settle()
    return list(rows.values())


def _converted(row: Row, example: Callable[[Row], Any]) -> Row | None:
    try:
        converted = example(row)
    except DataError:
        raise
    except Exception as error:
        what = f"example(row) failed with {type(error).__name__}: {error}"
        raise DataError(f"{what}; the row's keys are {keys(row)}") from error
    if converted is not None and not isinstance(converted, dict):
        raise DataError(f"example(row) returned {shown(converted)}, neither a dict nor None")
    return converted
