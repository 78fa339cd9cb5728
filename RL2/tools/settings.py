"""Settings of a command, given as `key=value` words and declared by a dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

from RL2.config.load import words
from RL2.config.values import build, needs_value
from RL2.errors import ConfigError

Settings = TypeVar("Settings")


def parse_settings(cls: type[Settings], given: Sequence[str]) -> Settings:
    """Return an instance of the dataclass `cls` with the values of `key=value` words.

    Raise ConfigError for an unknown key, a missing one, or an invalid value.
    """
    values, known = words(given), [f for f in fields(cls) if f.init]  # type: ignore[arg-type]
    if unknown := sorted(values.keys() - {f.name for f in known}):
        raise ConfigError(f"{unknown[0]!r} is not a setting; they are {', '.join(f'{f.name}=' for f in known)}")
    if missing := [f.name for f in known if needs_value(f) and f.name not in values]:
        raise ConfigError(f"{missing[0]}= is missing")
    result: Any = build(cls, values, "")
    return result
