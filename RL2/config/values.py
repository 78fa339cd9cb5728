"""Types of the values of keys, and how a plain value becomes one of them."""

from __future__ import annotations

import math
import re
import types
import typing
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
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

"""What names are like that stand in keys and in metrics: parts of a reward, metrics of an environment, test sets."""

NAME_RULE = "a name has letters, digits, _ and -, and begins with a letter or _"

Count = Annotated[int, Range(1)]

Index = Annotated[int, Range(0)]

Seed = Annotated[int, Range(0, 2**63 - 1)]

Share = Annotated[float, Range(0, 1)]

NonNegative = Annotated[float, Range(0)]

PositiveFloat = Annotated[float, Range(0, open_low=True)]


def build(annotation: Any, value: Any, key: str) -> Any:
    """`value` as `annotation`; `key` is its full name, for errors."""
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        if not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r}; {key} is a group: set {key}.NAME=value")
        hints = typing.get_type_hints(annotation, include_extras=True)
        prefix = f"{key}." if key else ""
        if unknown := sorted(f"{prefix}{name}" for name in set(value) - set(hints)):
            raise ConfigError(f"nothing reads {', '.join(unknown)}")
        if missing := [f.name for f in fields(annotation) if f.name not in value and needs_value(f)]:
            raise ConfigError(f"{', '.join(prefix + name for name in missing)} missing in the YAML")
        given = [f.name for f in fields(annotation) if f.name in value]
        return annotation(**{name: build(hints[name], value[name], prefix + name) for name in given})

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
    if value is None:
        raise ConfigError(f"{key} is not set; pass {key}=...")
    if annotation is float and type(value) is int:
        value = float(value) if abs(value) < 2**1023 else math.inf
    if annotation is str and type(value) in (int, float):
        return str(value)
    if type(value) is not annotation:
        raise ConfigError(f"{key}={value!r}; expected {_NAMES[annotation]}")
    if annotation is float and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}; expected a finite number")
    return value


def needs_value(f: Field[Any]) -> bool:
    """Return whether a field of a dataclass has no default."""
    return f.default is MISSING and f.default_factory is MISSING


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
