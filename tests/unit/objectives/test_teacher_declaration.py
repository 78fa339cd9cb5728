"""Objectives that read statistics of a teacher: their declaration, and their refusal where no teacher is configured."""

from __future__ import annotations

from pathlib import Path

import pytest

from RL2.errors import ConfigError
from RL2.objectives.objective import Loss, Objective, needs
from RL2.objectives.registry import TEACHER_OBJECTIVES, BoundObjective, bind, bound
from RL2.types import TEACHER_MENU, TOP, TokenBatch, TokenStats

SCRIPT = """
from RL2.objectives.objective import needs


@needs("logp", "jsd", beta="share")
def mixed(stats, batch, *, share: float = 0.25):
    return stats.jsd - stats.logp, {}
"""


def divergence(stats: TokenStats, batch: TokenBatch, *, share: float = 0.25) -> Loss:
    return stats.jsd, {}


def test_an_objective_asks_for_beta_by_the_name_of_a_knob() -> None:
    objective = needs("jsd", beta="share")(divergence)
    assert objective.needs_teacher
    request = BoundObjective("divergence", objective, {"share": 0.4}).request()
    assert (request.beta, request.teacher_temperature, request.fields) == (0.4, 1.0, ("jsd", "logp", "entropy"))
    assert not needs("logp")(divergence).needs_teacher


def test_beta_and_top_k_go_with_their_statistics() -> None:
    with pytest.raises(ValueError, match=r"jsd goes with @needs\(..., beta='KNOB'\)"):
        needs("jsd")
    with pytest.raises(ValueError, match="jsd goes with"):
        needs("kl_teacher_student", beta="share")
    for name in TOP:
        with pytest.raises(ValueError, match=r"go with @needs\(..., top_k='KNOB'\)"):
            needs(name)
    with pytest.raises(ValueError, match=f"the menu is logp, .*{', '.join(TEACHER_MENU)}"):
        needs("teacher")


@pytest.mark.parametrize("name", TEACHER_OBJECTIVES)
def test_built_in_objectives_are_refused_without_a_teacher(name: str) -> None:
    with pytest.raises(ConfigError, match=f"actor.objective={name} reads .*, and no teacher is configured"):
        bind(name, {})


def test_without_a_teacher_the_objective_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    name = f"{tmp_path}/mine.py:mixed"
    with pytest.raises(ConfigError, match=r"mine.py:mixed reads jsd, and no teacher is configured"):
        bind(name, {})
    objective: Objective = needs("teacher_logp")(divergence)
    with pytest.raises(ConfigError, match=r"objective=.*reads teacher_logp, and no teacher is configured"):
        bound(objective, {})
