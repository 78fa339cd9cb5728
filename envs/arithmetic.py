"""Exact arithmetic on text written by a model; shared by environments.

Supports numbers, `+ - * /` and parentheses, but no names and no powers. Text that is longer or nested deeper than the
limits is refused before anything is computed, so a value never has more digits than the text has characters.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 200
MAX_DEPTH = 20

TOKEN = re.compile(r"[0-9]+(?:\.[0-9]+)?|[-+*/()]")
SIGNS = str.maketrans({"\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/", "\N{MINUS SIGN}": "-"})


def evaluate(text: str) -> tuple[Fraction, list[Fraction]]:
    """Return the value of an expression and its numbers from left to right. Raise ValueError if it is invalid."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"an expression has at most {MAX_LENGTH} characters")
    text = text.translate(SIGNS)
    if rest := TOKEN.sub("", text).strip():
        raise ValueError(f"{rest[0]!r} does not belong in an expression")
    reader = _Reader(TOKEN.findall(text))
    try:
        value = reader.sum(0)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    if reader.next is not None:
        raise ValueError(f"{reader.next!r} is out of place")
    return value, reader.numbers


class _Reader:
    """Recursive-descent parser over tokens with one token of lookahead."""

    def __init__(self, tokens: list[str]) -> None:
        self.numbers: list[Fraction] = []
        self._tokens = iter(tokens)
        self.next = next(self._tokens, None)

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.next in ("+", "-"):
            sign = -1 if self.take() == "-" else 1
            value += sign * self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self.next in ("*", "/"):
            if self.take() == "*":
                value *= self.factor(depth)
            else:
                value /= self.factor(depth)
        return value

    def factor(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ValueError(f"parentheses and signs are nested at most {MAX_DEPTH} deep")
        token = self.take()
        if token in ("+", "-"):
            return self.factor(depth + 1) * (-1 if token == "-" else 1)
        if token == "(":
            value = self.sum(depth + 1)
            if self.take() != ")":
                raise ValueError("a parenthesis is not closed")
            return value
        if token is None or not token[0].isdigit():
            raise ValueError(f"a number is missing before {token!r}" if token else "a number is missing at the end")
        self.numbers.append(Fraction(token))
        return self.numbers[-1]

    def take(self) -> str | None:
        token, self.next = self.next, next(self._tokens, None)
        return token
