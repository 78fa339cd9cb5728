"""Audit of a judge: its agreement with itself when asked again, and when two responses are swapped.

For scripts that judge with a model, such as envs/judge.py. `async def marks(question, response, answer, repeat)`
returns marks between 0 and 1 by criterion, `async def prefer(question, first, second)` returns "A", "B" or "tie". Calls
without an answer are excluded, counted and reported.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from rich.table import Table

from RL2.config.scripts import load_script
from RL2.data.bad_rows import load_converted
from RL2.data.source import from_json
from RL2.errors import UserError, one_line
from RL2.tools.eval.intervals import Estimate, over_problems

OPPOSITE = {"A": "B", "B": "A", "tie": "tie"}


@dataclass(frozen=True)
class Audit:
    """Result of an audit of a judge, with 95% intervals."""

    rows: int
    agreement: dict[str, Estimate]
    """Criterion -> probability that two marks of one response are equal."""
    difference: dict[str, Estimate]
    """Criterion -> mean distance of two marks of one response, as a share of the scale."""
    flips: Estimate | None
    """Probability that a verdict on two responses changes when they are swapped; None without pairs."""
    first: Estimate | None
    """Probability that the first response wins minus that of the second; 0 without position bias."""
    chosen: Estimate | None
    """Share of the verdicts that the data's chosen response wins; a tie counts half."""
    failures: Counter[str]
    """Reason for a missing answer -> count."""


def audit(script: str | Path, data: str, limit: int = 50, repeats: int = 3) -> Audit:
    """Ask the judge of `script` about the first rows of `data`: `repeats` times each, and about pairs in both orders.

    Raise UserError if the script or the data have nothing to judge, or if the judge answers nothing.
    """
    module = load_script(script)
    if not hasattr(module, "marks") or not hasattr(module, "prefer"):
        raise UserError(f"{script} is not a judge: it needs `async def marks(...)` and `async def prefer(...)`")
    if repeats < 2:
        raise UserError(f"--repeats={repeats} must be at least 2: agreement is between repeats")
    rows = load_converted(data, module.example)[:limit]
    questions = [JudgedRow(row) for row in rows]
    if not any(question.responses for question in questions):
        raise UserError(f"{data}: no row has a response to judge, neither 'response' nor 'chosen' and 'rejected'")
    return asyncio.run(_audit(module, [question for question in questions if question.responses], repeats))


class JudgedRow:
    """A row with one response, or with two of which the first is the better one."""

    def __init__(self, row: dict[str, Any]) -> None:
        info = from_json(row.get("extra_info")) or {}
        self.text, self.answer = str(info.get("question", "")), info.get("answer")
        sides = [row[key] for key in ("chosen", "rejected") if row.get(key) is not None] or [row.get("response")]
        last = (row.get("messages") or [{}])[-1]
        if sides == [None] and last.get("role") == "assistant":
            sides = [last["content"]]
        self.responses = [_text(side) for side in sides if side is not None]


async def _audit(module: ModuleType, questions: list[JudgedRow], repeats: int) -> Audit:
    failures = Counter[str]()

    async def tried(call: Awaitable[Any]) -> Any:
        try:
            return await call
        except Exception as error:
            failures[one_line(f"{type(error).__name__}: {error}")] += 1
            return None

    def marked(question: JudgedRow) -> list[Awaitable[Any]]:
        # one response per row: two of one question may be correlated
        return [tried(module.marks(question.text, question.responses[0], question.answer, n)) for n in range(repeats)]

    found = await asyncio.gather(*(asyncio.gather(*marked(question)) for question in questions))
    pairs = [q for q in questions if len(q.responses) == 2]
    orders = [(q.text, *order) for q in pairs for order in (q.responses, q.responses[::-1])]
    verdicts = await asyncio.gather(*(tried(module.prefer(*order)) for order in orders))
    both = [(a, b) for a, b in zip(verdicts[::2], verdicts[1::2], strict=True) if a is not None and b is not None]
    marks_PR = [given for given in found if None not in given]
    if not marks_PR:
        raise UserError(f"the judge gave no marks; most often: {failures.most_common(1)[0][0]}")
    marks = {name: [[given[name] for given in row] for row in marks_PR] for name in marks_PR[0][0]}
    return Audit(
        rows=len(questions),
        agreement={name: agreement(values) for name, values in marks.items()},
        difference={name: difference(values) for name, values in marks.items()},
        flips=flips(both) if both else None,
        first=position_bias(both) if both else None,
        chosen=preference(both) if both else None,
        failures=failures,
    )


def agreement(marks_PR: Sequence[Sequence[float]]) -> Estimate:
    """Return the probability that two marks of one response are equal; P responses, R repeats of each.

    The value of a response is the share of its pairs of repeats that agree, because pairs of one response are
    correlated; the interval is over responses (`over_problems`).
    """
    return over_problems([fmean(a == b for a, b in combinations(row, 2)) for row in marks_PR])


def difference(marks_PR: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean distance of two marks of one response, between 0 and 1, with its interval over responses."""
    return over_problems([fmean(abs(a - b) for a, b in combinations(row, 2)) for row in marks_PR])


def flips(verdicts: Sequence[tuple[str, str]]) -> Estimate:
    """Return the probability that a verdict changes with the order; each item has the verdicts on both orders."""
    return over_problems([float(second != OPPOSITE[first]) for first, second in verdicts])


def position_bias(verdicts: Sequence[tuple[str, str]]) -> Estimate:
    """Return how much more often the first response wins than the second, over both orders: 0 is no bias, 1 always."""
    worth = {"A": 1.0, "B": -1.0, "tie": 0.0}
    return over_problems([(worth[first] + worth[second]) / 2 for first, second in verdicts], bounds=(-1.0, 1.0))


def preference(verdicts: Sequence[tuple[str, str]]) -> Estimate:
    """Return the share of verdicts for the response that is first in the first order; a tie counts half."""
    worth = {"A": 1.0, "B": 0.0, "tie": 0.5}
    return over_problems([(worth[first] + worth[OPPOSITE[second]]) / 2 for first, second in verdicts])


def table(found: Audit) -> Table:
    """Return a table of the estimates with their 95% intervals."""
    shown = Table(title=f"a judge of {found.rows} rows", title_justify="left")
    for heading in ("", "estimate", "95% interval"):
        shown.add_column(heading)
    lines: list[tuple[str, Estimate | None]] = []
    for name in found.agreement:
        lines.append((f"{name}: two marks are equal", found.agreement[name]))
        lines.append((f"{name}: distance of two marks", found.difference[name]))
    lines.append(("verdicts on pairs that change with the order", found.flips))
    lines.append(("first place wins, less second place", found.first))
    lines.append(("verdicts for the chosen response", found.chosen))
    for name, estimate in lines:
        if estimate is not None:
            shown.add_row(name, f"{estimate.value:.3f}", f"{estimate.low:.3f} to {estimate.high:.3f}")
    return shown


def notes(found: Audit) -> list[str]:
    """Return remarks about missing answers and position bias."""
    lines = [f"{number} times no answer: {cause}" for cause, number in found.failures.most_common(5)]
    if found.first is not None and not found.first.low <= 0 <= found.first.high:
        place = "first" if found.first.value > 0 else "second"
        lines.append(f"position bias: the {place} place wins more often than the responses explain")
    return lines


def _text(side: Any) -> str:
    side = from_json(side)
    return str(side[-1]["content"]) if isinstance(side, list) else str(side)
