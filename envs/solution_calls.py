"""Tests that call a solution in another process: `run_tests` runs in theirs, `serve` in the solution's.

The tests hold a `Remote` for each object of the solution. Calls and attributes are requested through a pipe; answers
are plain values (plain.py) or numbers of further objects. No class of the solution, and no change that it made to
Python, is present when values are compared.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from plain import decode, encode

LONGEST = 16 << 20
"""Limit in bytes of a question or an answer."""
ASKED: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **named: function(*args, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "contains": operator.contains,
    "iter": iter,
    "next": next,
    "len": len,
    "str": str,
    "repr": repr,
}


class Died(BaseException):
    """The solution's process is gone; tests cannot catch this."""


class Solution:
    """Proxy of the solution in the process of the tests."""

    def __init__(self, answers: int, questions: int) -> None:
        self.answers, self.questions = os.fdopen(answers, "rb"), os.fdopen(questions, "wb")
        self.remotes: dict[int, Remote] = {}

    def ask(self, what: str, target: int | str, *args: Any, **named: Any) -> Any:
        """Return the solution's answer, or raise its exception if that is one of Python's own."""
        sent = [encode(list(args), self.number_of), encode(named, self.number_of)]
        try:
            self.questions.write(json.dumps([what, target, *sent]).encode() + b"\n")
            self.questions.flush()
        except BrokenPipeError:
            raise Died from None
        line = self.answers.readline(LONGEST)
        if len(line) == LONGEST:
            raise ValueError(f"an answer is longer than {LONGEST >> 20} MiB")
        if not line.endswith(b"\n"):
            raise Died
        kind, value, changed = json.loads(line)
        if kind == "raised":
            raise exception(*value)
        for position, now in changed:
            update(args[position], decode(now, self.remote))
        return decode(value, self.remote)

    def remote(self, number: int) -> Remote:
        return self.remotes.setdefault(int(number), Remote(self, int(number)))

    def number_of(self, value: Any) -> int:
        if type(value) is not Remote:
            raise Uncrossable(f"a {type(value).__name__} cannot be handed to the solution")
        return object.__getattribute__(value, "number")


class Uncrossable(BaseException):
    """The tests pass a value to the solution that is not plain."""


class Remote:
    """Proxy of an object of the solution; it equals only itself."""

    def __init__(self, solution: Solution, number: int) -> None:
        def ask(what: str, *args: Any, **named: Any) -> Any:
            return solution.ask(what, number, *args, **named)

        object.__setattr__(self, "ask", ask)
        object.__setattr__(self, "number", number)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        return ask_of(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        ask_of(self, "setattr", name, value)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return ask_of(self, "call", *args, **named)

    def __getitem__(self, key: Any) -> Any:
        return ask_of(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        ask_of(self, "setitem", key, value)

    def __contains__(self, item: Any) -> bool:
        return bool(ask_of(self, "contains", item))

    def __iter__(self) -> Any:
        return ask_of(self, "iter")

    def __next__(self) -> Any:
        return ask_of(self, "next")

    def __len__(self) -> int:
        return ask_of(self, "len")

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return str(ask_of(self, "str"))

    def __repr__(self) -> str:
        return str(ask_of(self, "repr"))


def exception(names: list[str], text: str) -> Exception:
    """Return an exception with this text, of the first named class that is one of Python's own."""
    for name in names:
        known = getattr(builtins, str(name), None)
        if isinstance(known, type) and issubclass(known, Exception) and known is not Exception:
            try:
                return known.__new__(known, str(text))  # not all can be called with a text
            except TypeError:
                continue
    return RuntimeError(f"{names[0]}: {text}")


def ask_of(remote: Remote, what: str, *args: Any, **named: Any) -> Any:
    return object.__getattribute__(remote, "ask")(what, *args, **named)


def update(argument: Any, now: Any) -> None:
    """Apply to an argument the changes that the solution made to its copy."""
    if isinstance(argument, (list, bytearray)):
        argument[:] = now
    else:
        argument.clear()
        argument.update(now)


def run_tests(request: dict[str, Any], answers: int, questions: int) -> dict[str, Any]:
    """Return {"passed": [bool], "why": first failure, "died": bool}, or {"unscored": cause}.

    `request` has: `before`, code that runs first and does not need the solution; `names`, taken from the solution;
    `setup`, code that may need it; `tests`, a list of code; `optional`, code that may fail; and `stop`, whether to stop
    at the first test that fails.
    """
    space: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(request["optional"], space)
    except Exception:
        space = {"__name__": "tests"}
    try:
        exec(compile(request["before"], "tests", "exec"), space)
        setup = compile(request["setup"], "tests", "exec")
        tests = [compile(test, "tests", "exec") for test in request["tests"]]
    except Exception as error:
        return {"unscored": f"the tests cannot be run: {described(error)}"}
    solution = Solution(answers, questions)
    passed: list[bool] = []
    why, died = None, False
    try:
        solution.ask("load", "")
        for name in request["names"]:
            space[name.split("=")[0]] = solution.ask("name", name.split("=")[-1])
        exec(setup, space)
    except Uncrossable as error:
        return {"unscored": f"the tests cannot be run: {error}"}
    except Died:
        died = True
    except BaseException as error:
        why = described(error)
    for number, test in enumerate(tests if why is None and not died else [], 1):
        try:
            exec(test, space)
            passed.append(True)
            continue
        except Uncrossable as error:
            return {"unscored": f"the tests cannot be run: {error}"}
        except Died:
            died = True
            break
        except BaseException as error:
            passed.append(False)
            why = why or f"test {number}: {described(error)}"
            if request["stop"]:
                break
    return {"passed": passed, "why": why, "died": died}


def described(error: BaseException) -> str:
    """Return the type of an error and its message, if available: the solution may have overridden `__str__`."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def serve(sources: list[str], questions: int, answers: int) -> None:
    """Run the solution's code, part by part, when asked to; then answer questions until the tests close the pipe."""
    module = sys.modules["solution"] = ModuleType("solution")
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def number_of(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)  # kept, so that no other object gets its id
        return numbers[id(value)]

    def named(name: str) -> Any:
        space = module.__dict__
        if name in space:
            return space[name]
        if "Solution" in space:  # LeetCode's format
            return getattr(space["Solution"](), name)
        raise NameError(f"name {name!r} is not defined")

    with os.fdopen(questions, "rb") as reader, os.fdopen(answers, "wb") as writer:
        for line in reader:
            what, target, *rest = json.loads(line)
            changed: list[Any] = []
            try:
                if what == "load":
                    for source in sources:
                        exec(compile(source, "solution.py", "exec"), module.__dict__)
                    value = None
                elif what == "name":
                    value = named(target)
                else:
                    args, named_args = (decode(item, objects.__getitem__) for item in rest)
                    value = ASKED[what](objects[target], *args, **named_args)
                    for position, (before, arg) in enumerate(zip(rest[0], args, strict=True)):
                        if isinstance(arg, (list, dict, set, bytearray)):
                            after = encode(arg, number_of)
                            if after != before:
                                changed.append([position, after])
                sent = json.dumps(["value", encode(value, number_of), changed])
            except BaseException as error:
                names = [cls.__name__ for cls in type(error).__mro__]
                text = str(error.args[0] if len(error.args) == 1 else error)
                sent = json.dumps(["raised", [names, text[:300]], []])
            writer.write(sent.encode() + b"\n")
            writer.flush()
