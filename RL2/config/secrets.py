"""Secrets among settings: which they are, and settings without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_ARGUMENT = re.compile(r"(--[\w-]*(?:api-?key|token|secret|password)(?:=|$))(.*)", re.IGNORECASE | re.DOTALL)
_USER = re.compile(r"(?<=//)[^/@\s]+(?=@)")
MASK = "***"


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
