"""Errors that a user can fix, and text that is safe to print."""

from __future__ import annotations

import re

_DRIVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 without tab and line feed, DEL, C1, marks of direction and lines (Unicode TR 9, table 2), surrogates."""


def printable(text: str) -> str:
    """Return `text` with the characters that a terminal acts on as escapes, such as \\x1b; lines and tabs stay."""
    return _DRIVES.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def in_table(text: str) -> str:
    """Return `text` as rich shows it, as it stands: printable, and none of it markup."""
    from rich.markup import escape

    return escape(printable(text))


class UserError(Exception):
    """An error that the user can fix; programs print it, without a traceback, and end with exit code 1."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the override to change."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """`text`, which may quote a file: without ends of lines and what no terminal prints, and not endless."""
    whole = printable(" ".join(text.splitlines()))
    return whole if len(whole) <= MAX_ERROR else f"{whole[:MAX_ERROR]}..."


MAX_ERROR = 1000

"""Characters of an error that quotes a file."""


def first_line(error: BaseException) -> str:
    """Return what `error` says, or is, in one line: its first, with the next where this one only announces it."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] = f"{lines[0]} {lines[1].strip()}"
    return one_line(lines[0] if lines else repr(error))


class LostProcess(UserError):
    """Another process has died, or did not come to a meeting point in time."""
