"""Detection and masking of secrets in settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_SECRET = re.compile("TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_ARGUMENT = re.compile(r"(--[\w-]*(?:api-?key|token|secret|password)(?:=|$))(.*)", re.IGNORECASE | re.DOTALL)
_VALUE = re.compile(
    r"((?:--[\w-]*(?:api-?key|token|secret|password)(?:=|\s+)|\b\w*(?:TOKEN|KEY|SECRET|PASSW|CREDENTIAL)\w*=))"
    r"(?:'[^']*'|\"[^\"]*\"|\S+)",
    re.IGNORECASE,
)
_USER = re.compile(r"(?<=//)[^/@\s]+(?=@)")
MASK = "***"


def is_secret(name: str) -> bool:
    """Return whether an environment variable's name marks a secret: `*TOKEN*`, `*KEY*`, `*SECRET*`, `*PASSWORD*`."""
    return _SECRET.search(name) is not None and not name.upper().startswith("TOKENIZER")


def masked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with the secrets in servers' variables, command lines and addresses masked."""
    shown: dict[str, Any] = {}
    for name, value in settings.items():
        if name == "env" and isinstance(value, Mapping):
            shown[name] = {key: MASK if is_secret(str(key)) and each else each for key, each in value.items()}
        elif name == "agent" and isinstance(value, str):  # a command
            shown[name] = _VALUE.sub(rf"\1{MASK}", _USER.sub(MASK, value))
        elif isinstance(value, Mapping):
            shown[name] = masked(value)
        elif isinstance(value, list | tuple):
            shown[name] = type(value)(_arguments(value))
        else:
            shown[name] = _USER.sub(MASK, value) if isinstance(value, str) else value
    return shown


def _arguments(values: list[Any] | tuple[Any, ...]) -> list[Any]:
    """Return command-line arguments with the values of --api-key and similar options masked."""
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
