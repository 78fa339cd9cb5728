"""Every objective by name, and how its knobs are filled from the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from RL2.config import ConfigError
from RL2.objectives.declare import Objective
from RL2.objectives.path import sft, spo, spo_0p5
from RL2.objectives.policy import ppo

OBJECTIVES: dict[str, Objective] = {"sft": sft, "spo": spo, "spo_0p5": spo_0p5, "ppo": ppo}


def bind(name: str, knobs: Mapping[str, Any]) -> tuple[Objective, tuple[str, ...]]:
    """The objective `name` with those of `knobs` that it takes, and the statistics it needs.

    Raises ConfigError for a name that is not in the table and for a knob that nothing fills.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"actor.objective={name!r}; choose one of {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[name]
    wanted = [p.name for p in inspect.signature(objective).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if missing := [knob for knob in wanted if knob not in knobs]:
        raise ConfigError(f"actor.objective={name!r} has a knob that nothing fills: {', '.join(missing)}")
    return partial(objective, **{knob: knobs[knob] for knob in wanted}), objective.needs  # type: ignore[attr-defined]
