"""Functions that a researcher replaces: each declares what it reads, and a key names it or its file.

`Declared` is the base of objectives (`RL2.objectives.objective`) and advantage estimators (`RL2.batch.estimator`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pickle import PicklingError
from typing import Any, TypeVar, get_type_hints

from RL2.config.scripts import ScriptError, import_script
from RL2.config.values import build
from RL2.errors import ConfigError


@dataclass(frozen=True)
class Declared:
    """A function with its declaration."""

    function: Callable[..., Any]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of the function, by name."""
        return dict(inspect.signature(self.function).parameters)

    @property
    def knobs(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters, by name: what a configuration may set."""
        return {name: p for name, p in self.parameters.items() if p.kind is p.KEYWORD_ONLY}

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each knob that has one."""
        return {name: p.default for name, p in self.knobs.items() if p.default is not p.empty}

    @property
    def hints(self) -> dict[str, Any]:
        """The annotations of the function, with the ranges of knobs."""
        return get_type_hints(self.function, include_extras=True)

    def refuse_unknown(self, given: Iterable[str], of: str) -> None:
        """Raise ConfigError, which begins with `of`, if the function has not all of the `given` knobs."""
        if unknown := [knob for knob in given if knob not in self.knobs]:
            raise ConfigError(f"{of} does not read {', '.join(unknown)}; {self.knobs_in_words}")

    @property
    def knobs_in_words(self) -> str:
        """A clause that lists the knobs, for error messages."""
        return f"its knobs are {', '.join(self.knobs)}" if self.knobs else "it has no knobs"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as functions are pickled: by module and name."""
        module, name = self.function.__module__, self.function.__qualname__
        if "<locals>" in name:
            raise PicklingError(f"{module}.{name} is not at the top of a module")
        return _imported, (module, name)


def _imported(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


D = TypeVar("D", bound=Declared)


def function_of(key: str, name: str) -> Any:
    """Return the function of `path.py:function`, the value of `key`. Raise ConfigError if there is none."""
    path, colon, function = name.rpartition(":")
    if not colon:
        raise ConfigError(f"{key}={name}; expected path.py:function")
    try:
        found = getattr(import_script(path), function, None)
    except ScriptError as error:
        raise ConfigError(f"{key}={name}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{key}={name}: {path} has no function {function}")
    return found


def find(key: str, name: str, table: Mapping[str, D], kind: type[D], declaration: str) -> D:
    """Return `table[name]`, or the function of `path.py:function`, the value of `key`.

    Raise ConfigError if there is none, or if the function is not a `kind`; `declaration` is the line that makes it one.
    """
    if ":" in name:
        found = function_of(key, name)
        if not isinstance(found, kind):
            raise ConfigError(f"{key}={name}: say what it reads, {declaration}")
        return found
    if name not in table:
        raise ConfigError(f"{key}={name}; choose one of {', '.join(table)}, or path.py:function")
    return table[name]


def argument(key: str, what: str | D, table: Mapping[str, D], kind: type[D], declaration: str) -> tuple[str, D]:
    """Return the name and the function of `what`, an argument `key` in Python: a function, or as in `find`."""
    if isinstance(what, str):
        return what, find(key, what, table, kind, declaration)
    name = getattr(getattr(what, "function", what), "__name__", repr(what))
    if not isinstance(what, kind):
        raise ConfigError(f"{key}={name}: say what it reads, {declaration}")
    return name, what


def knob_values(key: str, name: str, of: Declared, given: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """Return every knob of `of` with its value: those `given`, the others at their defaults.

    `name` is the value of `key`, and `keys` has the key of each knob, for errors. Raise ConfigError for a knob that the
    function does not have, one without a value, and a value that does not fit the annotation.
    """
    known, hints = of.knobs, of.hints
    if unknown := [keys[knob] for knob in given if knob not in known]:
        raise ConfigError(f"{', '.join(unknown)} has no effect: {key}={name} does not read it; {of.knobs_in_words}")
    values = {**of.defaults, **given}
    if missing := [keys[knob] for knob in known if knob not in values]:
        raise ConfigError(f"{key}={name} needs {missing[0]}=...")
    built = {knob: build(hints[knob], value, keys[knob]) for knob, value in given.items() if knob in hints}
    return {knob: {**values, **built}[knob] for knob in known}
