"""Advantage estimators: functions that declare what they read of a rollout."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from RL2.config.functions import Declared
from RL2.types import TokenBatch

READABLE: dict[str, str] = {
    "rewards": "batch.reward_T",
    "groups": "batch.group_B, batch.role_B, and the argument group_size",
    "values": "batch.value_T",
    "parts": "the arguments part_NP and weight_P",
    "means": "the argument mean_N",
    "greedy": "the argument greedy_N",
    "tokens": "batch.token_ids_T and batch.labels_T",
    "logps": "batch.engine_logp_T",
    "truncated": "batch.truncated_B",
    "branches": "batch.before_T and batch.after_T, values of the places around a token from continuations",
    "sum_p2": "batch.old_logp_T and batch.old_sum_p2_T, of the policy before the update",
}
"""Names that an estimator may declare, and where it finds each."""

INPUTS = {"group_size": "groups", "part_NP": "parts", "weight_P": "parts", "mean_N": "means", "greedy_N": "greedy"}
"""Arguments that the trainer fills, and what an estimator with such an argument reads."""

WHITENING = ("global_norm", "norm_var")
"""Settings of every estimator that reads values: the trainer whitens its advantages."""

AdvantageFunction = Callable[..., Tensor]
"""(batch: TokenBatch, *, inputs..., knobs...) -> advantage_T.

A pure function of the whole rollout, which every process calls with the same arguments. Inputs and knobs are
keyword-only; knobs have an annotation and a default. With values of a critic it returns the advantages before any
whitening: `advantage_T + value_T` is the target of the critic.
"""


@dataclass(frozen=True)
class Estimator(Declared):
    """A function from a rollout to advantages, with its declaration; a call is a call of the function."""

    reads: tuple[str, ...]
    """Keys of `READABLE` that it reads."""
    baseline: bool = False
    """The claim that equal rewards in all groups give advantages of exactly 0."""

    def __call__(self, batch: TokenBatch, **arguments: Any) -> Tensor:
        """Return the advantage of each token, [T]."""
        advantage_T: Tensor = self.function(batch, **arguments)
        return advantage_T

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arguments that the trainer fills."""
        return tuple(name for name in self.parameters if name in INPUTS)

    @property
    def knobs(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters that a configuration may set, by name."""
        return {name: p for name, p in super().knobs.items() if name not in INPUTS}

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of its knobs, and of the settings of whitening if that applies."""
        return (*self.knobs, *(WHITENING if "values" in self.reads else ()))


def reads(*what: str, baseline: bool = False) -> Callable[[AdvantageFunction], Estimator]:
    """Return a decorator that makes an `Estimator` of a function that reads `what`, keys of `READABLE`.

    `baseline` claims that equal rewards in all groups give advantages of exactly 0. Raise ValueError for what no
    estimator can read, and for an argument of the function that is filled from what is not declared.
    """
    if unknown := set(what) - READABLE.keys():
        raise ValueError(f"nothing to read: {', '.join(sorted(unknown))}; choose from {', '.join(READABLE)}")

    def declare(function: AdvantageFunction) -> Estimator:
        estimator = Estimator(function, what, baseline)
        for name in estimator.inputs:
            if INPUTS[name] not in what:
                raise ValueError(f"the argument {name} goes with @reads({INPUTS[name]!r})")
        return estimator

    return declare
