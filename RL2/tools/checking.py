"""Shared parts of the checkers of a user's functions: findings, and the settings of knobs that they are tried at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from RL2.config.functions import Declared
from RL2.config.scripts import described
from RL2.config.values import build
from RL2.errors import ConfigError

Setting = dict[str, Any]
"""Every knob of a function with a value."""


class Unsound(Exception):
    """A failed check; the message is the reason."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    passed: bool
    reason: str
    """Fault and remedy; for a check that passed, what was seen."""


def assert_passed(findings: Iterable[Finding]) -> None:
    """Raise AssertionError, with a line for each check that failed."""
    failed = [finding for finding in findings if not finding.passed]
    assert not failed, "\n".join(f"{finding.name}: {finding.reason}" for finding in failed)


def raises(function: Callable[..., Any], error: Exception) -> str:
    """Return what a user's function raised, with the line in its file."""
    file = inspect.getfile(inspect.unwrap(function))
    return f"it raises {described(error, file, file)}"


class Tried:
    """A declared function with the settings of its knobs that it is tried at."""

    given: Setting
    """Knobs that are not at their defaults."""

    @property
    def declared(self) -> Declared:
        """The function."""
        raise NotImplementedError

    @cached_property
    def base(self) -> Setting:
        """The given knobs, and the others at their defaults."""
        hints = self.declared.hints
        return self.declared.defaults | {knob: build(hints[knob], value, knob) for knob, value in self.given.items()}

    @cached_property
    def alternatives(self) -> dict[str, list[Any]]:
        """Other values of each knob, from its annotation."""
        hints = self.declared.hints
        return {knob: [*other_values(hints[knob], value, knob)] for knob, value in self.base.items()}

    @cached_property
    def settings(self) -> list[Setting]:
        """The base setting, and each that differs from it in one knob."""
        return [self.base, *(self.base | {knob: x} for knob, values in self.alternatives.items() for x in values)]

    def named(self, setting: Setting) -> str:
        """Return the knobs in which the setting differs from the base setting, as text."""
        return ", ".join(f"{knob}={x}" for knob, x in setting.items() if x != self.base[knob])


def check_knobs(subject: Tried) -> None:
    """Raise Unsound unless every knob has an annotation and a default."""
    for name, p in subject.declared.knobs.items():
        if name not in subject.declared.hints or p.default is p.empty:
            raise Unsound(f"the knob {name} needs an annotation and a default, as in `{name}: float = 0.5`")


def check_effects(subject: Tried, differ: Callable[[Setting, Setting], bool]) -> str:
    """Return which knobs change the result; raise Unsound for one that does not. `differ` compares two settings."""
    for knob, values in subject.alternatives.items():
        if not values:
            raise Unsound(
                f"no other value of the knob {knob} can be tried; annotate it with bool, int, float, Literal[...], "
                "a range of numbers from RL2.config.values, or one of them | None"
            )
        # a knob may only have an effect together with another one
        if not any(differ(other, other | {knob: x}) for other in subject.settings for x in values):
            raise Unsound(f"the knob {knob} changes nothing (tried {', '.join(map(str, values))}): use it or remove it")
    names = list(subject.alternatives)
    return f"{', '.join(names)} {'each change' if len(names) > 1 else 'changes'} the result" if names else "it has none"


def other_values(hint: Any, value: Any, knob: str) -> Iterator[Any]:
    """Yield other values than `value` that fit the annotation `hint` of `knob`."""
    candidates: list[Any] = []
    for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        kind = get_args(part)[0] if get_origin(part) is Annotated else part
        number = value if type(value) in (int, float) and value != 0 else None
        if get_origin(kind) is Literal:
            candidates += get_args(kind)
        elif kind is bool:
            candidates += [True, False]
        elif kind is int:
            candidates += [1, 2, 8] if number is None else [number * 2, number // 2, number + 1]
        elif kind is float:
            candidates += [0.5, 2.0] if number is None else [number * 2, number / 2]
        elif kind is type(None):
            candidates.append(None)
    tried = [value]
    for x in candidates:
        try:
            fits = build(hint, x, knob)
        except ConfigError:
            continue
        if fits not in tried:
            tried.append(fits)
            yield fits
