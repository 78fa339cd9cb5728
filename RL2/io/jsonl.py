"""Reader of the .jsonl files of runs. A last line without its end is incomplete and is left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from RL2.errors import UserError, first_line


def read_lines(file: Path, start: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield each complete line from byte `start` on, with the offset of its end; a missing file has none."""
    if not file.exists():
        return
    with file.open("rb") as lines:
        lines.seek(start)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield line, start


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a run's file, as `parse_record`. Raise UserError if one is invalid."""
    for number, (line, _) in enumerate(read_lines(file), 1):
        yield parse_record(line, f"{file}, line {number}")


def parse_record(line: bytes, where: str) -> dict[str, Any]:
    """Return a record of a run: an object with an integer `step`. Raise UserError naming `where` for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {first_line(error)}") from error
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise UserError(f"{where} is not a record of a run: it has no step")
    return row


class JsonlTail:
    """Reader of a file that another process appends to."""

    def __init__(self, file: Path) -> None:
        self.file, self.place = file, 0
        self.identity: tuple[int, int] | None = None

    def _identity(self) -> tuple[int, int] | None:
        if not self.file.exists():
            return None
        status = self.file.stat()
        return status.st_dev, status.st_ino

    @property
    def is_another(self) -> bool:
        """True if the file was replaced or truncated, as by a resumed run; earlier records may be gone."""
        return self.identity is not None and (
            self._identity() != self.identity or os.path.getsize(self.file) < self.place
        )

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the records since the last call. Raise UserError if one is invalid."""
        self.identity = self._identity()
        for line, end in read_lines(self.file, self.place):
            self.place = end
            yield parse_record(line, f"{self.file}: the line that ends at byte {self.place}")


def truncate_before(file: Path, step: int) -> None:
    """Remove the records of `step` and later, and an incomplete last line.

    The file is read from its end: the steps of a run's records never decrease.
    """
    with file.open("r+b") as lines:
        keep = lines.seek(0, os.SEEK_END)
        for start, line in lines_backwards(lines):
            if line.endswith(b"\n") and parse_record(line, f"{file}, byte {start}")["step"] < step:
                break
            keep = start
        lines.truncate(keep)
        os.fsync(lines.fileno())


def remove_incomplete_line(file: Path) -> None:
    """Remove a last line without its end from a file, if it exists."""
    if not file.exists():
        return
    with file.open("r+b") as lines:
        start, last = next(lines_backwards(lines), (0, b"\n"))
        if not last.endswith(b"\n"):
            lines.truncate(start)


def lines_backwards(file: BinaryIO, block: int = 2**20) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file, last first, each with its offset in bytes."""
    position, rest = file.seek(0, os.SEEK_END), b""
    while position:
        size = min(block, position)
        position = file.seek(position - size)
        first, *others = (file.read(size) + rest).splitlines(keepends=True)
        start = position + len(first) + sum(map(len, others))
        for line in reversed(others):
            start -= len(line)
            yield start, line
        rest = first  # it may begin before this block
    if rest:
        yield 0, rest
