"""Check an objective: `rl2 check-objective mine.py:focal`; in a test, `assert_sound("mine.py:focal")`.

Each check (checks.py) runs at the default knobs and with one knob changed at a time, on one small batch. A finding says
what to change. An objective makes a value constant with `.detach()`: a value computed under `torch.no_grad()` looks to
the gradient check like a missing part of the derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from RL2.errors import ConfigError
from RL2.objectives.objective import Objective
from RL2.objectives.registry import DECLARATION
from RL2.tools.check_objective import checks, teacher
from RL2.tools.check_objective.subject import Subject
from RL2.tools.check_objective.two_ranks import Pair, PairError
from RL2.tools.checking import Finding, Unsound, assert_passed, raises


def check(
    objective: str | Objective, given: Mapping[str, Any] | None = None, *, pair: Pair | None = None
) -> list[Finding]:
    """Return a finding for each check of an objective: a built-in name, `path.py:function`, or the objective itself.

    `given` has the knobs that are not at their defaults. `pair` has two processes, to check many objectives in a row.
    If the contract is broken, the other checks do not run. Raise ConfigError for an objective or a knob that cannot be
    found.
    """
    subject = Subject(objective, dict(given or {}))
    _accept(subject)
    findings = [_run(subject, "contract", checks.contract)]
    if not findings[0].passed:
        return findings
    with ExitStack() as stack:
        two = pair or stack.enter_context(Pair())  # they start while the other checks run
        others: dict[str, Callable[[Subject], str]] = {
            "statistics": checks.statistics,
            "gradient": checks.derivative,
            "closed form": checks.closed_form,
            "limits": checks.limits,
            "weights": checks.weights,
            "invariance": lambda subject: checks.invariance(subject, two),
            "knobs": checks.effects,
        }
        if subject.function.needs_teacher:
            others["teacher"] = teacher.expectation
        return findings + [_run(subject, name, one) for name, one in others.items()]


def assert_sound(
    objective: str | Objective, given: Mapping[str, Any] | None = None, *, pair: Pair | None = None
) -> None:
    """Raise AssertionError, with a line for each check that failed; for tests."""
    assert_passed(check(objective, given, pair=pair))


def _accept(subject: Subject) -> None:
    if not isinstance(subject.function, Objective):
        raise ConfigError(f"{subject.source}: say what it reads, {DECLARATION}")
    subject.function.refuse_unknown(subject.given, str(subject.source))


def _run(subject: Subject, name: str, one: Callable[[Subject], str]) -> Finding:
    try:
        return Finding(name, True, one(subject))
    except Unsound as error:
        return Finding(name, False, str(error))
    except PairError as error:
        return Finding(name, False, f"in two processes: {error}")
    except ConfigError:  # a given value that does not fit its knob
        raise
    except Exception as error:
        return Finding(name, False, raises(subject.function.function, error))
