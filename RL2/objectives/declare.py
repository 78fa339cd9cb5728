"""How an objective says which token statistics it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from RL2.types import MENU

Loss = tuple[Tensor, dict[str, Tensor]]
"""loss_T, and metrics: one value per token each, of which the mean over all trained tokens is reported."""

Objective = Callable[..., Loss]
"""(stats: TokenStats, batch: TokenBatch, *, knobs...) -> Loss.

A pure function. It sees action tokens only: `stats` and the `_T` fields of `batch` are aligned. It does not average:
the trainer sums `loss_T * weight_T`. Knobs are keyword-only.
"""

F = TypeVar("F", bound=Objective)


def needs(*fields: str) -> Callable[[F], F]:
    """Note on an objective which statistics it reads; the function itself stays as it is."""
    if unknown := set(fields) - set(MENU):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; the menu is {', '.join(MENU)}")

    def note(objective: F) -> F:
        objective.needs = fields  # type: ignore[attr-defined]
        return objective

    return note
