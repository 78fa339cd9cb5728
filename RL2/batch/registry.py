"""Every advantage estimator by name, or from a file, with its knobs set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from RL2.batch.advantages import branch, gae, gdpo, rae, reinforce, remax, rloo, spo
from RL2.batch.estimator import Estimator
from RL2.batch.group_advantages import best_of_group, gpg, maxrl, opo, otb, pass_at_k, soft_value
from RL2.config import functions
from RL2.config.trainer import Advantage
from RL2.errors import ConfigError
from RL2.types import TokenBatch

ESTIMATORS: dict[str, Estimator] = {
    "reinforce": reinforce,
    "gdpo": gdpo,
    "rloo": rloo,
    "rae": rae,
    "remax": remax,
    "maxrl": maxrl,
    "opo": opo,
    "gpg": gpg,
    "pass_at_k": pass_at_k,
    "best_of_group": best_of_group,
    "soft_value": soft_value,
    "otb": otb,
    "branch": branch,
    "spo": spo,
    "gae": gae,
}

KEY, ARGS = "adv.estimator", "adv.args"

DECLARATION = "@reads('rewards', ...) of RL2.batch.estimator"

NAMED: dict[str, Any] = {"norm_var": False, "global_norm": False, "std_over": None, "gamma": 1, "lamda": 1}
"""Knobs with a key of their own, `adv.NAME`, and the value that turns each off; the others are set by adv.args."""


@dataclass(frozen=True)
class BoundEstimator:
    """An estimator with its knobs set."""

    name: str
    estimator: Estimator
    knobs: dict[str, Any]
    """Every knob with its value."""

    @property
    def needs_critic(self) -> bool:
        """True if it reads the values of a critic."""
        return "values" in self.estimator.reads

    @property
    def needs_old_policy(self) -> bool:
        """True if it reads statistics of the policy before the update."""
        return "sum_p2" in self.estimator.reads

    @property
    def needs_greedy(self) -> bool:
        """True if it reads the reward of a greedy response to each prompt."""
        return "greedy" in self.estimator.reads

    @property
    def needs_branches(self) -> bool:
        """True if it reads values of places within responses."""
        return "branches" in self.estimator.reads

    def advantages(self, batch: TokenBatch, inputs: Mapping[str, Any]) -> Tensor:
        """Return the advantage of each token before whitening, [T]; `inputs` has what `INPUTS` names."""
        return self.estimator(batch, **{name: inputs[name] for name in self.estimator.inputs}, **self.knobs)


def find(name: str) -> Estimator:
    """Return the estimator of this name, or of `path.py:function`. Raise ConfigError if there is none."""
    return functions.find(KEY, name, ESTIMATORS, Estimator, DECLARATION)


def bound(estimator: str | Estimator, knobs: Mapping[str, Any]) -> BoundEstimator:
    """Return an estimator with its knobs set, both given in Python. Raise ConfigError as `configured` does."""
    name, found = functions.argument("estimator", estimator, ESTIMATORS, Estimator, DECLARATION)
    keys = {knob: knob for knob in (*found.knobs, *knobs)}
    return BoundEstimator(name, found, functions.knob_values("estimator", name, found, knobs, keys))


def configured(adv: Advantage) -> BoundEstimator:
    """Return the estimator of a configuration.

    Raise ConfigError for an estimator that does not exist, a knob in `adv.args` that it does not have, and a value that
    does not fit the knob's annotation.
    """
    estimator = find(adv.estimator)
    if named := [knob for knob in adv.args if knob in NAMED]:
        raise ConfigError(f"{ARGS}.{named[0]} has a key of its own; set adv.{named[0]}")
    given = {knob: getattr(adv, knob) for knob in NAMED if knob in estimator.knobs} | adv.args
    keys = {knob: f"adv.{knob}" if knob in NAMED else f"{ARGS}.{knob}" for knob in (*estimator.knobs, *given)}
    return BoundEstimator(adv.estimator, estimator, functions.knob_values(KEY, adv.estimator, estimator, given, keys))
