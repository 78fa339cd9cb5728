"""Every objective by name, or from a file, and how its knobs are filled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

from RL2.config.load import ARGS
from RL2.config.model import Actor
from RL2.config.scripts import ScriptError, load_script
from RL2.config.values import build
from RL2.errors import ConfigError
from RL2.objectives.objective import Gradient, Objective
from RL2.objectives.policy_gradient import cispo, gspo, ppo, reinforce, sapo
from RL2.objectives.rank import rank_jsd, rank_kl
from RL2.objectives.spo import binary_jsd, cross_entropy, spo, spo_0p5

OBJECTIVES: dict[str, Objective] = {
    "sft": cross_entropy,
    "positive_ce": cross_entropy,
    "spo": spo,
    "spo_0p5": spo_0p5,
    "binary_jsd": binary_jsd,
    "rank_jsd": rank_jsd,
    "rank_kl": rank_kl,
    "reinforce": reinforce,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
}


def configured(actor: Actor) -> BoundObjective:
    """The objective of a configuration."""
    named = {"clip": actor.clip, "detach_target": actor.path.detach_target, "region": actor.path.region}
    return bind(actor.objective, {knob: x for knob, x in named.items() if x is not None} | actor.objective_args)


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its knobs set."""

    name: str
    loss: Objective
    fields: tuple[str, ...]
    """The statistics that it reads."""
    top_k: int
    """K of `top_logp` and `top_id`; 0 if it reads neither."""
    knobs: dict[str, Any]
    """Every knob with its value."""
    gradient: Gradient | None
    """Its closed form, if it has one."""

    def check(self, vocabulary: int) -> None:
        """Raise ConfigError unless a model with so many tokens has as many as it looks at."""
        if self.top_k > vocabulary:
            raise ConfigError(
                f"actor.objective={self.name} looks at {self.top_k} tokens, and actor.model_name has {vocabulary}; "
                f"lower {ARGS}.{find(self.name).top_k}"  # type: ignore[attr-defined]
            )


def find(name: str) -> Objective:
    """The objective of the table, or of `path.py:function`. Raises ConfigError where there is none."""
    path, colon, function = name.rpartition(":")
    if not colon:
        if name not in OBJECTIVES:
            raise ConfigError(f"actor.objective={name}; choose one of {', '.join(OBJECTIVES)}, or path.py:function")
        return OBJECTIVES[name]
    try:
        objective = getattr(load_script(path), function, None)
    except ScriptError as error:
        raise ConfigError(f"actor.objective={name}: {error}") from error
    if not callable(objective):
        raise ConfigError(f"actor.objective={name}: {path} has no function {function}")
    if not hasattr(objective, "needs"):
        raise ConfigError(f"actor.objective={name}: say what it reads, @needs('logp', ...) of RL2.objectives.objective")
    return objective


def knobs(objective: Objective) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of an objective, by name."""
    parameters = inspect.signature(objective).parameters
    return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


NAMED = {"clip": "actor.clip", "detach_target": "actor.path.detach_target", "region": "actor.path.region"}
"""Knobs that have a key of their own; the others stand in actor.objective_args."""


def bind(name: str, given: Mapping[str, Any]) -> BoundObjective:
    """The objective `name` with `given` knobs; the others keep their defaults.

    Raises ConfigError for an objective that is not there, a knob that it does not have or that has no value, and a
    value that does not fit the knob's annotation.
    """
    objective = find(name)
    known, hints = knobs(objective), get_type_hints(objective, include_extras=True)
    keys = {knob: NAMED.get(knob, f"{ARGS}.{knob}") for knob in (*known, *given)}
    if unknown := [keys[knob] for knob in given if knob not in known]:
        has = f"its knobs are {', '.join(known)}" if known else "it has no knobs"
        raise ConfigError(f"{', '.join(unknown)} has no effect: actor.objective={name} does not read it; {has}")
    values = {knob: given.get(knob, p.default) for knob, p in known.items()}
    if missing := [keys[knob] for knob, value in values.items() if value is inspect.Parameter.empty]:
        raise ConfigError(f"actor.objective={name} needs {missing[0]}=...")
    values |= {knob: build(hints[knob], value, keys[knob]) for knob, value in given.items() if knob in hints}
    top_k = objective.top_k  # type: ignore[attr-defined]
    return BoundObjective(
        name=name,
        loss=partial(objective, **values),
        fields=objective.needs,  # type: ignore[attr-defined]
        top_k=0 if top_k is None else values[top_k],
        knobs=values,
        gradient=objective.gradient,  # type: ignore[attr-defined]
    )
