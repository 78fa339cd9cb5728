"""How an objective says what it reads."""

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
the trainer sums `loss_T * weight_T`. Knobs are keyword-only, with an annotation and a default.
"""

Gradient = Callable[..., Tensor]
"""(p_TV, batch: TokenBatch, *, knobs...) -> gradient_TV: the closed form of d(sum of loss_T)/dz, z the logits.

`p_TV` is the whole distribution of each token. Plain formulas for people and for `rl2 check-objective`, which compares
them with what autograd finds; training does not call them.
"""

F = TypeVar("F", bound=Objective)


def needs(*fields: str, top_k: str | None = None, gradient: Gradient | None = None) -> Callable[[F], F]:
    """Note on an objective which statistics it reads; the function itself stays as it is.

    `top_k`: the knob that says how many of the most likely tokens `top_logp` and `top_id` hold.
    """
    if unknown := set(fields) - set(MENU):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; the menu is {', '.join(MENU)}")
    if bool({"top_logp", "top_id"} & set(fields)) != (top_k is not None):
        raise ValueError("top_logp and top_id go with @needs(..., top_k='KNOB'), the knob that says how many")

    def note(objective: F) -> F:
        objective.needs, objective.top_k, objective.gradient = fields, top_k, gradient  # type: ignore[attr-defined]
        return objective

    return note
