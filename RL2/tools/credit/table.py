"""Tables of `rl2 credit`: tokens that decided, and how well objectives and selection rules agree with them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from RL2.credit.agreement import agreement
from RL2.credit.search import Bounds
from RL2.errors import in_table
from RL2.tools.eval.intervals import over_problems

RULES = ("entropy of the top fifth", "not the mode", "above one half")
"""Rules that select tokens, instead of an objective."""
MEASURES = {"rank": (-1.0, 1.0), "signed": (-1.0, 1.0), "share": (0.0, 1.0), "sign": (0.0, 1.0)}
"""Measure -> its least and largest value."""
MOST_TOKENS = 12
"""Number of tokens that the table of the terminal lists."""


def agreements(answers: Sequence[dict[str, Any]], objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each objective and rule its agreement with the measured advantages, with intervals over problems.

    A measure is the mean over the answers of a problem, then over problems. `random` is the share of tokens that are
    decisive, what a rule that knows nothing has as `share`.
    """
    top = np.quantile([x for one in answers for x in one["entropy"]], 0.8) if answers else 0.0
    found = []
    for title in (*objectives, *RULES):
        by_row: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for one in answers:
            pulls = one["pulls"][title] if title in objectives else _selected(title, one, float(top))
            advantages = [Bounds(*bounds) for bounds in one["advantage"]]
            if not any(bounds.value for bounds in advantages):
                continue  # there is nothing to rank
            for name, value in agreement(pulls, advantages).items():
                by_row[name][one["row"]].append(value)
        row: dict[str, Any] = {"title": title, "is_rule": title not in objectives}
        for name, bounds in MEASURES.items():
            values = [fmean(of) for of in by_row[name].values()]
            if title in RULES and name in ("signed", "sign"):
                continue  # a selection has no sign
            row[name] = list(over_problems(values, bounds=bounds)) if values else None
            row["problems"] = max(row.get("problems", 0), len(values))
        row["random"] = fmean([fmean(of) for of in by_row["random"].values()]) if by_row["random"] else None
        found.append(row)
    return found


def _selected(rule: str, one: dict[str, Any], top: float) -> list[float]:
    """Return 1 for each token that a rule selects, else 0."""
    if rule == RULES[0]:
        return [float(x >= top) for x in one["entropy"]]
    if rule == RULES[1]:
        return [float(rank > 1) for rank in one["rank"]]
    return [float(logp > math.log(0.5)) for logp in one["logp"]]


def tables(result: dict[str, Any]) -> Group:
    """Return tables for the terminal."""
    decisive = [
        (bounds, one, t)
        for one in result["answers"]
        for t, bounds in enumerate(one["advantage"])
        if Bounds(*bounds).is_decided
    ]
    total = sum(len(one["tokens"]) for one in result["answers"])
    what = Table(
        title=f"step {result['step']}: {len(decisive)} of {total} tokens in {len(result['answers'])} answers decided",
        title_justify="left",
    )
    for heading in ("row", "token", "text", "advantage", "95% interval", "alternative", "its advantage"):
        what.add_column(heading)
    for bounds, one, t in sorted(decisive, key=lambda each: -abs(each[0][0]))[:MOST_TOKENS]:
        other = next((other for other in one["alternatives"] if other["at"] == t), None)
        what.add_row(
            f"{one['row']}.{one['sample']}",
            str(t),
            in_table(repr(one["tokens"][t])),
            f"{bounds[0]:+.2f}",
            f"{bounds[1]:+.2f} to {bounds[2]:+.2f}",
            "" if other is None else in_table(repr(other["text"])),
            "" if other is None else f"{other['advantage'][0]:+.2f}",
        )
    rules = Table(title="agreement with the measured advantages, 95% intervals over problems", title_justify="left")
    for heading in ("objective or rule", "rank of |pull|", "rank, signed", "share on decisive", "sign"):
        rules.add_column(heading, justify="left" if heading.startswith("objective") else "right")
    for row in sorted(result["agreement"], key=lambda each: -(each["rank"] or [-2])[0]):
        rules.add_row(in_table(row["title"]), *(_interval(row.get(name)) for name in MEASURES))
    shares = [row["random"] for row in result["agreement"] if row["random"] is not None]
    if shares:
        rules.caption = f"equal pulls would have a share of {shares[0]:.2f} on decisive tokens"
    return Group(what, rules)


def _interval(found: list[float] | None) -> str:
    return "" if found is None else f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"
