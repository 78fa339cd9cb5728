"""Values in the notation of arguments that are not JSON: Python's literals, and the marked texts of Gemma 4.

Nothing is evaluated, and reading takes time linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPACE = re.compile(r"\s*")
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?(?![\w.])")
WORD = re.compile(r"[A-Za-z]+(?!\w)")
WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
MOST_DIGITS = 4000
"""Limit of the digits of a number; Python reads no integers of more than 4300."""


@dataclass(frozen=True)
class Notation:
    """A notation: it differs from others in its texts."""

    text: Callable[[str, int], tuple[str, int] | None]
    """Return the text literal at an offset and the offset after it; None if there is none. Raise ValueError if it is
    not closed."""
    key: re.Pattern[str] | None = None
    """Pattern of a bare key of an object, with its name as a group; None: keys are texts."""

    def read(self, source: str, at: int, depth: int) -> tuple[Any, int]:
        """Return the value at offset `at`, of at most `depth` nested levels, and the offset after it.

        Raise ValueError, with the reason, if there is none.
        """
        at = _skip(source, at)
        if (found := self.text(source, at)) is not None:
            return found
        if source.startswith(("[", "(", "{"), at):
            if depth < 1:
                raise ValueError("it is nested too deeply")
            return self._object(source, at + 1, depth) if source[at] == "{" else self._list(source, at, depth)
        if word := WORD.match(source, at):
            if word[0] in WORDS:
                return WORDS[word[0]], word.end()
            raise ValueError(f"{word[0]!r:.40} at character {at} is not a value")
        if number := NUMBER.match(source, at):
            return _number(number[0]), number.end()
        raise ValueError(f"expected a value at character {at}")

    def _list(self, source: str, at: int, depth: int) -> tuple[list[Any], int]:
        closing = "]" if source[at] == "[" else ")"
        values: list[Any] = []
        at = _skip(source, at + 1)
        while not source.startswith(closing, at):
            value, at = self.read(source, at, depth - 1)
            values.append(value)
            at = separated(source, at, closing)
        return values, at + 1

    def _object(self, source: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
        values: dict[str, Any] = {}
        at = _skip(source, at)
        while not source.startswith("}", at):
            key, at = self._key(source, at)
            at = _skip(source, at)
            if not source.startswith(":", at):
                raise ValueError(f"expected a colon at character {at}")
            values[key], at = self.read(source, at + 1, depth - 1)
            at = separated(source, at, "}")
        return values, at + 1

    def _key(self, source: str, at: int) -> tuple[str, int]:
        if (found := self.text(source, at)) is not None:
            return found
        if self.key is not None and (bare := self.key.match(source, at)):
            return bare[1], bare.end()
        raise ValueError(f"expected a key at character {at}")


def separated(source: str, at: int, closing: str) -> int:
    """Return the offset of the next value, or of `closing`. Raise ValueError if neither is there."""
    at = _skip(source, at)
    if source.startswith(",", at):
        return _skip(source, at + 1)
    if not source.startswith(closing, at):
        raise ValueError(f"expected a comma or {closing} at character {at}")
    return at


def _skip(source: str, at: int) -> int:
    found = SPACE.match(source, at)
    return found.end() if found else at


def _number(text: str) -> int | float:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number has more than {MOST_DIGITS} digits")
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return number


ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|\n|.)", re.DOTALL)
ESCAPED = {"\n": "", "n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a"}
ESCAPED |= {"\\": "\\", "'": "'", '"': '"'}
MOST_CHARACTER = 0x10FFFF
PYTHON_TEXT = re.compile(r"'([^'\\]*(?:\\.[^'\\]*)*)'|\"([^\"\\]*(?:\\.[^\"\\]*)*)\"", re.DOTALL)
MARKED = '<|"|>'
"""Mark before and after a text of Gemma 4, in which nothing is escaped."""


def unescaped(body: str) -> str:
    """Return the text that the body of a Python literal means. Raise ValueError for half of a surrogate pair."""
    text = ESCAPE.sub(_character, body)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a string has half of a surrogate pair") from error
    return text


def _character(found: re.Match[str]) -> str:
    code = found[1]
    if code in ESCAPED:
        return ESCAPED[code]
    if code[0].isdigit() and code[0] < "8":
        return chr(int(code, 8))
    if len(code) > 1 and int(code[1:], 16) <= MOST_CHARACTER:
        return chr(int(code[1:], 16))
    return found[0]  # Python keeps what is no escape


def _python_text(source: str, at: int) -> tuple[str, int] | None:
    if not source.startswith(("'", '"'), at):
        return None
    found = PYTHON_TEXT.match(source, at)
    if found is None:
        raise ValueError("a string is not closed")
    return unescaped(found[1] if found[1] is not None else found[2]), found.end()


def _marked_text(source: str, at: int) -> tuple[str, int] | None:
    if not source.startswith(MARKED, at):
        return None
    end = source.find(MARKED, at + len(MARKED))
    if end < 0:
        raise ValueError("a string is not closed")
    return source[at + len(MARKED) : end], end + len(MARKED)


PYTHON = Notation(_python_text)
GEMMA = Notation(_marked_text, re.compile(r'([^\s:,{}\[\]<>"]+)'))
