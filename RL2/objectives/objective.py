"""Objectives: functions that declare the statistics that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from RL2.config.functions import Declared
from RL2.types import MENU, TokenBatch, TokenStats

Loss = tuple[Tensor, dict[str, Tensor]]
"""loss_T, and metrics [T], of which the mean over all trained tokens is reported."""

LossFunction = Callable[..., Loss]
"""(stats: TokenStats, batch: TokenBatch, *, knobs...) -> Loss.

A pure function of action tokens: `stats` and the `_T` fields of `batch` are aligned. It does not average: the trainer
sums `loss_T * weight_T`. Knobs are keyword-only, with an annotation and a default.
"""

Gradient = Callable[..., Tensor]
"""(p_TV, batch: TokenBatch, *, knobs...) -> gradient_TV: the closed form of d(sum of loss_T)/dz, z the logits.

`p_TV` is the whole distribution of each token. These formulas are for readers and for `rl2 check-objective`, which
compares them with autograd; training does not call them.
"""


@dataclass(frozen=True)
class Objective(Declared):
    """A loss function with its declaration; a call is a call of the function."""

    needs: tuple[str, ...]
    """The statistics that it reads."""
    top_k: str | None = None
    """Name of the knob that sets K of `top_logp` and `top_id`."""
    gradient: Gradient | None = None
    """Closed form of the gradient, if there is one."""

    def __call__(self, stats: TokenStats, batch: TokenBatch, **knobs: Any) -> Loss:
        """Return the loss of each token and the metrics."""
        loss: Loss = self.function(stats, batch, **knobs)
        return loss


def needs(
    *fields: str, top_k: str | None = None, gradient: Gradient | None = None
) -> Callable[[LossFunction], Objective]:
    """Return a decorator that makes an `Objective` of a loss function that reads the statistics `fields`.

    `top_k` names the knob that says how many of the most likely tokens `top_logp` and `top_id` hold. Raise ValueError
    for a statistic that is not in the menu.
    """
    if unknown := set(fields) - set(MENU):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; the menu is {', '.join(MENU)}")
    if bool({"top_logp", "top_id"} & set(fields)) != (top_k is not None):
        raise ValueError("top_logp and top_id go with @needs(..., top_k='KNOB'), the knob that says how many")
    return lambda function: Objective(function, fields, top_k, gradient)
