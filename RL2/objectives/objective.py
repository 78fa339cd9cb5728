"""Objectives: functions that declare the statistics that they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from RL2.config.functions import Declared
from RL2.types import MENU, TEACHER_MENU, TOP, TokenBatch, TokenStats

Loss = tuple[Tensor, dict[str, Tensor]]
"""loss_T, and metrics [T], of which the mean over all trained tokens is reported."""

LossFunction = Callable[..., Loss]
"""(stats: TokenStats, batch: TokenBatch, *, knobs...) -> Loss.

A pure function of action tokens: `stats` and the `_T` fields of `batch` are aligned. It does not average: the trainer
sums `loss_T * weight_T`. Knobs are keyword-only, with an annotation and a default.
"""

Gradient = Callable[..., Tensor]
"""(p_TV, batch: TokenBatch, *, knobs...) -> gradient_TV: the closed form of d(sum of loss_T)/dz, z the logits.

`p_TV` is the whole distribution of each token. An objective that reads statistics of a teacher has the closed form
(p_TV, q_TV, batch, *, knobs...), with the teacher's distribution. These formulas are for readers and for
`rl2 check-objective`, which compares them with autograd; training does not call them.
"""


@dataclass(frozen=True)
class Objective(Declared):
    """A loss function with its declaration; a call is a call of the function."""

    needs: tuple[str, ...]
    """The statistics that it reads."""
    top_k: str | None = None
    """Name of the knob that sets K of the statistics in `types.TOP`."""
    gradient: Gradient | None = None
    """Closed form of the gradient, if there is one."""
    beta: str | None = None
    """Name of the knob that sets beta of `jsd`."""
    trains_on: Literal["rollout", "pairs", "labels"] = "rollout"
    """Its data: sampled tokens, pairs of a chosen and a rejected response, or responses with a label, good or bad."""
    reference: bool = False
    """True if it reads `batch.ref_logp_T`: programs then load a reference, also without a KL divergence."""
    covariance: bool = False
    """True if it reads `batch.covariance_rank_T`, which needs the policy before the update."""

    @property
    def needs_teacher(self) -> bool:
        """True if it reads a statistic of a teacher."""
        return bool(set(TEACHER_MENU) & set(self.needs))

    def __call__(self, stats: TokenStats, batch: TokenBatch, **knobs: Any) -> Loss:
        """Return the loss of each token and the metrics."""
        loss: Loss = self.function(stats, batch, **knobs)
        return loss


def needs(
    *fields: str,
    top_k: str | None = None,
    gradient: Gradient | None = None,
    beta: str | None = None,
    trains_on: Literal["rollout", "pairs", "labels"] = "rollout",
    reference: bool = False,
    covariance: bool = False,
) -> Callable[[LossFunction], Objective]:
    """Return a decorator that makes an `Objective` of a loss function that reads the statistics `fields`.

    `top_k` names the knob that says how many of the most likely tokens the fields in `types.TOP` hold, and `beta` the
    knob that is beta of `jsd`. `trains_on`, `reference` and `covariance` are those of `Objective`. Raise ValueError for
    a statistic that is not in the menu.
    """
    menu = (*MENU, *TEACHER_MENU)
    if unknown := set(fields) - set(menu):
        raise ValueError(f"no such token statistic: {', '.join(sorted(unknown))}; the menu is {', '.join(menu)}")
    if bool(set(TOP) & set(fields)) != (top_k is not None):
        raise ValueError(f"{', '.join(TOP)} go with @needs(..., top_k='KNOB'), the knob that says how many")
    if ("jsd" in fields) != (beta is not None):
        raise ValueError("jsd goes with @needs(..., beta='KNOB'), the knob that is its beta")
    return lambda function: Objective(function, fields, top_k, gradient, beta, trains_on, reference, covariance)
