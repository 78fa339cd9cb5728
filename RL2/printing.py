"""What may be printed or written down: no text that drives a terminal, and no secret."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_DRIVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 without tab and line feed, DEL, C1, marks of direction and lines (Unicode TR 9, table 2), surrogates."""
_SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_ARGUMENT = re.compile(r"(--[\w-]*(?:api-?key|token|secret|password)(?:=|$))(.*)", re.IGNORECASE | re.DOTALL)
_USER = re.compile(r"(?<=//)[^/@\s]+(?=@)")
MASK = "***"


def printable(text: str) -> str:
    """Return `text` with the characters that a terminal acts on as escapes, such as \\x1b; lines and tabs stay."""
    return _DRIVES.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def in_table(text: str) -> str:
    """Return `text` as rich shows it, as it stands: printable, and none of it markup."""
    from rich.markup import escape

    return escape(printable(text))


def is_secret(name: str) -> bool:
    """Return whether an environment variable is named as secrets are: `*TOKEN*`, `*KEY*`, `*SECRET*`, `*PASSWORD*`."""
    return _SECRET.search(name) is not None and not name.upper().startswith("TOKENIZER")


def masked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` without secrets: in the variables and arguments of servers, and in addresses."""
    shown: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "env" and isinstance(value, Mapping):
            shown[name] = {key: MASK if is_secret(str(key)) and each else each for key, each in value.items()}
        elif isinstance(value, Mapping):
            shown[name] = masked(value)
        elif isinstance(value, list | tuple):
            shown[name] = type(value)(_arguments(value))
        else:
            shown[name] = _USER.sub(MASK, value) if isinstance(value, str) else value
    return shown


def _arguments(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Return `values` with what follows --api-key and the like, in the same word or the next, masked."""
    shown, follows = list[Any](), False
    for value in values:
        found = _ARGUMENT.fullmatch(value) if isinstance(value, str) else None
        if follows:
            value = MASK
        elif found is not None and found[2]:
            value = found[1] + MASK
        elif isinstance(value, str):
            value = _USER.sub(MASK, value)
        shown.append(value)
        follows = found is not None and not found[1].endswith("=")
    return shown
