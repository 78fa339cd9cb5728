"""Types of the values of keys, defaults, and how a plain value becomes one of these types."""

from __future__ import annotations

import math
import re
import types
import typing
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from RL2.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Bounds of a number; an open bound is excluded."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False

    def holds(self, x: float) -> bool:
        return (self.low < x if self.open_low else self.low <= x) and x <= self.high

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"at most {self.high:g}" if self.high < math.inf else ""
        return " and ".join(filter(None, [low, high]))


NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
"""Pattern of the names that occur in keys and metrics: reward parts, metrics of an environment, test sets."""

NAME_RULE = "a name has letters, digits, _ and -, and begins with a letter or _"

Count = Annotated[int, Range(1)]
Index = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Share = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]
PositiveFloat = Annotated[float, Range(0, open_low=True)]


def interpolated(text: str) -> Any:
    """Return a field whose default is `text`, in which `${key}` stands for the value of another key."""
    return field(metadata={"default": text})


def defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of a group of keys, and of the groups in it, as plain values.

    None stands for a key without a default; interpolations are not resolved.
    """
    hints = typing.get_type_hints(cls)
    return {f.name: defaults(hints[f.name]) if is_dataclass(hints[f.name]) else _default(f) for f in fields(cls)}


def _default(f: Field[Any]) -> Any:
    if f.default_factory is not MISSING:
        return f.default_factory()
    if f.default is MISSING:
        return f.metadata.get("default")
    return list(f.default) if isinstance(f.default, tuple) else f.default


def keys(cls: type, prefix: str = "") -> list[str]:
    """Return the keys of a group and of the groups in it; NAME stands for a name of the user's own."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            found += keys(hint, f"{prefix}{name}.")
            continue
        found.append(f"{prefix}{name}")
        if (member := member_of(hint)) is not None:
            found += keys(member, f"{prefix}{name}.NAME.")
    return found


def member_of(hint: Any) -> type | None:
    """Return the dataclass of the members of a group with names of the user's own, if they are groups too."""
    member = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else None
    return member if isinstance(member, type) and is_dataclass(member) else None


def unset(cls: type, values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the keys of a group that need a value and have none."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        value = values.get(name, MISSING)
        if is_dataclass(hint) and isinstance(value, dict):
            assert isinstance(hint, type)
            found += unset(hint, value, f"{prefix}{name}.")
        elif value is None and type(None) not in typing.get_args(hint) and not is_dataclass(hint):
            found.append(prefix + name)
    return found


def build(annotation: Any, value: Any, key: str) -> Any:
    """Return `value` as an instance of `annotation`; `key` is its full name, for errors."""
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        return _group(annotation, value, key)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        number = build(args[0], value, key)
        if not args[1].holds(number):
            raise ConfigError(f"{key}={value!r}; must be {args[1]}")
        return number
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{key}={value!r}; choose {'one of ' if len(args) > 1 else ''}{', '.join(map(str, args))}"
            )
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return build(next(a for a in args if a is not type(None)), value, key)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r}; {key} is a group: set {key}.NAME=value")
        if is_dataclass(args[1]):
            return {str(name): build(args[1], each, f"{key}.{name}") for name, each in value.items()}
        return value
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise ConfigError(f"{key}={value!r}; expected a list: '{key}=[...]'")
        each = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(build(a, x, f"{key}[{i}]") for i, (a, x) in enumerate(zip(each, value, strict=True)))
    return _plain(annotation, value, key)


def _group(cls: type, value: Any, key: str) -> Any:
    """Return the dataclass `cls` with the fields of the mapping `value`."""
    if not isinstance(value, dict):
        raise ConfigError(f"{key}={value!r}; {key} is a group: set {key}.NAME=value")
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = f"{key}." if key else ""
    if unknown := sorted(f"{prefix}{name}" for name in set(value) - set(hints)):
        raise ConfigError(f"nothing reads {', '.join(unknown)}")
    if missing := [f.name for f in fields(cls) if f.name not in value and needs_value(f)]:
        raise ConfigError(f"{', '.join(prefix + name for name in missing)}: missing in the configuration")
    given = [f.name for f in fields(cls) if f.name in value]
    return cls(**{name: build(hints[name], value[name], prefix + name) for name in given})


def _plain(cls: type, value: Any, key: str) -> Any:
    """Return `value` as an integer, number, string or truth value."""
    if value is None:
        raise ConfigError(f"{key} is not set; pass {key}=...")
    if cls is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if cls is str and type(value) in (int, float):
        return str(value)
    if type(value) is not cls:
        raise ConfigError(f"{key}={value!r}; expected {TYPES[cls]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}; expected a finite number")
    return value


def needs_value(f: Field[Any]) -> bool:
    """Return whether a field of a dataclass has no default."""
    return f.default is MISSING and f.default_factory is MISSING


TYPES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
"""Plain types in words."""
