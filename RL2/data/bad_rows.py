"""Rows of a file that cannot be used: all are looked at before the run stops, or goes on without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from RL2.data.source import DataError

SHOWN = 5
"""Bad rows that an error quotes."""
LONGEST = 160
"""Characters of what is wrong with one of several rows."""


class FatalDataError(DataError):
    """What is wrong with every row, or takes too long to look for in others."""


class BadRows:
    """The rows of one file that cannot be used, by number from 0, each with what is wrong with it."""

    def __init__(self, path: str, *, skip: bool = False, key: str = "") -> None:
        """`skip`: the run goes on without them. `key`: the setting that says so, for the error."""
        self.path, self.skip, self.key = path, skip, key
        self.found: dict[int, str] = {}

    @contextmanager
    def row(self, number: int) -> Iterator[None]:
        """Note what is wrong with row `number` if a DataError is raised within."""
        try:
            yield
        except FatalDataError as error:
            raise FatalDataError(f"{self.path}, row {number + 1}: {error}") from error
        except DataError as error:
            self.found[number] = str(error)

    def settle(self, total: int) -> None:
        """Raise DataError if some of `total` rows are bad and the run is to stop at them, or if all are."""
        if not self.found or (self.skip and len(self.found) < total):
            return
        numbers = sorted(self.found)
        if len(numbers) == 1:
            said = f"row {numbers[0] + 1}: {self.found[numbers[0]]}"
        else:
            said = "; ".join(f"row {number + 1}: {self.found[number]:.{LONGEST}}" for number in numbers[:SHOWN])
            more = f", the first {SHOWN} of them shown" if len(numbers) > SHOWN else ""
            said += f" ({len(numbers)} of {total} rows cannot be used{more})"
        if self.key and not self.skip:
            said += f"; {self.key}=skip goes on without such rows"
        raise DataError(f"{self.path}, {said}")
