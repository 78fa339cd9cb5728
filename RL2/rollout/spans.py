"""Places in a response: from characters of its text to the tokens that were sampled."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""Replacement character: bytes that are no text decode to it."""


def last_tokens(decode: Callable[[list[int]], str], token_ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return, for each of `ends`, the index of the token with which so many characters of the text are whole.

    Characters are Unicode code points of `decode(token_ids)`. A token that goes on behind the place is the one that
    reaches it. A character of several tokens is whole with the last of them; so is one that stands for bytes that are
    no text.
    """
    text = decode(list(token_ids))

    @cache
    def prefix(number: int) -> str:
        return decode(list(token_ids[:number]))

    def found(end: int) -> int:
        wanted = text[:end]
        number = bisect_left(range(len(token_ids)), True, key=lambda k: prefix(k).startswith(wanted))
        while wanted.endswith(REPLACEMENT) and number < len(token_ids) and prefix(number + 1) == prefix(number):
            number += 1
        return number - 1

    return [found(end) for end in ends]
