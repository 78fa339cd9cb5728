"""Types of the values of keys, defaults, and how a plain value becomes one of these types."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class Node:
    """A key of a configuration, or a group of keys."""

    path: tuple[str, ...]
    """Names of the groups that it is in, from the outermost on, and its own."""
    hint: Any
    """Type of its values; a group has a dataclass."""
    owner: type
    """Dataclass that declares it."""
    field: Field[Any]

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def is_group(self) -> bool:
        return is_dataclass(self.hint)

    @property
    def default(self) -> Any:
        """Default of a key as a plain value; None for a key without one. Interpolations are not resolved."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        if self.field.default is MISSING:
            return self.field.metadata.get("default")
        return list(self.field.default) if isinstance(self.field.default, tuple) else self.field.default


def nodes(cls: type, path: tuple[str, ...] = (), *, members: bool = False) -> Iterator[Node]:
    """Yield the keys and groups of a dataclass in their order, each group before what is in it.

    With `members`, they include the keys of groups with names of the user's own, where NAME is in place of a name.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for each in fields(cls):
        node = Node((*path, each.name), hints[each.name], cls, each)
        yield node
        if node.is_group:
            yield from nodes(node.hint, node.path, members=members)
        elif members and typing.get_origin(node.hint) is dict:
            member = typing.get_args(node.hint)[-1]
            if isinstance(member, type) and is_dataclass(member):
                yield from nodes(member, (*node.path, "NAME"), members=True)


def value_at(values: Any, path: Sequence[str]) -> Any:
    """Return the value at `path` in nested mappings; MISSING if there is none."""
    for name in path:
        if not isinstance(values, dict):
            return MISSING
        values = values.get(name, MISSING)
    return values


def defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of a group of keys, and of the groups in it, as plain values; see `Node.default`."""
    found: dict[str, Any] = {}
    for node in nodes(cls):
        value_at(found, node.path[:-1])[node.path[-1]] = {} if node.is_group else node.default
    return found


def keys(cls: type) -> list[str]:
    """Return the keys of a group and of the groups in it; NAME stands for a name of the user's own."""
    return [node.key for node in nodes(cls, members=True) if not node.is_group]


def unset(cls: type, values: dict[str, Any]) -> list[str]:
    """Return the keys of a group that need a value and have none."""
    required = (node for node in nodes(cls) if not node.is_group and type(None) not in typing.get_args(node.hint))
    return [node.key for node in required if value_at(values, node.path) is None]


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

START, LATEST, EMA, POLICY = "start", "latest", "ema", "policy"
"""Values of settings that name a model which stand for versions of the policy: before training, of the last checkpoint,
the exponential moving average, and the policy itself."""
