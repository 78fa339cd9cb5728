"""Errors that a user can fix, and text that is safe to print."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_DRIVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that can drive a terminal or break a line: C0 without tab and line feed, DEL, C1, marks of direction and
lines (Unicode TR 9, table 2), surrogates."""


def printable(text: str) -> str:
    """Return `text` with control characters replaced by escapes such as \\x1b; line feeds and tabs stay."""
    return _DRIVES.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def in_table(text: str) -> str:
    """Return `text` for a cell of a rich table: printable, with markup escaped."""
    from rich.markup import escape

    return escape(printable(text))


class UserError(Exception):
    """An error that the user can fix; programs print it as one line, without a traceback, and exit with status 1."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError, ValueError):
    """An invalid setting; the message names the override to change."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class ModelError(ConfigError):
    """A model that cannot be used; the message begins with its name."""


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Add the configuration key of a model's name in front of the message of a ModelError from the `with` block."""
    try:
        yield
    except ModelError as error:
        raise ConfigError(f"{key}={error}") from error


def one_line(text: str) -> str:
    """Return `text`, which may quote a file, as one printable line of at most MAX_ERROR characters."""
    whole = printable(" ".join(text.splitlines()))
    return whole if len(whole) <= MAX_ERROR else f"{whole[:MAX_ERROR]}..."


MAX_ERROR = 1000
"""Maximum length of a one-line error, in characters."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, with the second if the first ends with a colon.

    An error without a message is returned as its repr.
    """
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] = f"{lines[0]} {lines[1].strip()}"
    return one_line(lines[0] if lines else repr(error))


class LostProcess(UserError):
    """Another process died, or did not arrive at a synchronisation point in time."""
