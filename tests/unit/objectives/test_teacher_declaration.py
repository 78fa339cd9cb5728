"""Objectives that read statistics of a teacher: their declaration, and their refusal where no teacher is configured."""

from __future__ import annotations

from pathlib import Path

import pytest

from RL2.config.model import Teacher
from RL2.errors import ConfigError
from RL2.objectives.objective import Loss, needs
from RL2.objectives.registry import TEACHER_OBJECTIVES, BoundObjective, bind
from RL2.trainer.unused_settings import check_teacher
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
    assert (request.beta, request.needs_teacher, request.fields) == (0.4, True, ("jsd", "logp", "entropy"))
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
    with pytest.raises(ConfigError, match=f"actor.objective={name} reads .* of a teacher, and there is none; pass tea"):
        check_teacher(Teacher(), bind(name, {}))
    check_teacher(Teacher(model_name="start"), bind(name, {}))


def test_your_own_objective_is_refused_without_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SCRIPT)
    objective = bind(f"{tmp_path}/mine.py:mixed", {})
    with pytest.raises(ConfigError, match=r"mine.py:mixed reads jsd of a teacher, and there is none"):
        check_teacher(Teacher(), objective)


def test_a_teacher_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"teacher.model_name=m has no effect: actor.objective=ppo reads no teacher"):
        check_teacher(Teacher(model_name="m"), bind("ppo", {}))
