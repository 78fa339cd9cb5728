"""Sums of objectives: what they read, their knobs, losses and closed forms, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from RL2.errors import ConfigError
from RL2.objectives.registry import ALL, bind, find
from RL2.objectives.sums import split
from RL2.tools.check_objective.subject import Subject, synthetic_batch
from RL2.types import TokenStats

OWN = """
from RL2.objectives.objective import needs


@needs("logp")
def mine(stats, batch, *, clip: float = 0.5):
    return -stats.logp * clip, {"clipped": stats.logp.detach()}


@needs("jsd", beta="share")
def other(stats, batch, *, share: float = 0.5):
    return stats.jsd, {}
"""


def test_a_sum_reads_what_its_terms_read() -> None:
    both = find("ppo+0.5*gkd")
    assert both.needs == ("logp", "jsd")
    assert (both.top_k, both.beta, both.needs_teacher) == (None, "beta", True)
    assert set(both.knobs) == set(ALL["ppo"].knobs) | set(ALL["gkd"].knobs)
    assert bind("ppo+0.5*gkd", {"beta": 0.2, "clip": 0.1}).beta == 0.2
    assert not find("ppo+0.1*sft").needs_teacher


def test_its_loss_and_gradient_are_the_weighted_sums() -> None:
    subject = Subject("ppo+0.25*opd", {})
    on = synthetic_batch(subject.vocabulary)
    knobs, logits_TV = bind("ppo+0.25*opd", {}).knobs, on.logits_TV
    loss_T, metrics = subject.dense(knobs, logits_TV, on)
    terms = [Subject(name, {}) for name in ("ppo", "opd")]
    (ppo_T, ppo_metrics), (opd_T, _) = (term.dense(term.base, logits_TV, on) for term in terms)
    torch.testing.assert_close(loss_T, ppo_T + 0.25 * opd_T, rtol=1e-12, atol=0)
    assert metrics.keys() == {*ppo_metrics, "loss_ppo", "loss_opd"}
    torch.testing.assert_close(metrics["loss_opd"], opd_T)
    p_TV, q_TV = logits_TV.softmax(-1), on.teacher_TV.softmax(-1)
    formulas = [term.function.gradient for term in (subject, *terms)]
    assert all(formula is not None for formula in formulas)
    whole, of_ppo, of_opd = formulas
    exact_TV = of_ppo(p_TV, on.batch, **terms[0].base) + 0.25 * of_opd(p_TV, q_TV, on.batch)  # type: ignore[misc]
    torch.testing.assert_close(whole(p_TV, q_TV, on.batch, **knobs), exact_TV)  # type: ignore[misc]


def test_weights_and_names() -> None:
    assert split("opd") == [(1.0, "opd")]
    assert split("0.5*opd+ppo + 2*sft") == [(0.5, "opd"), (1.0, "ppo"), (2.0, "sft")]
    assert find("opd") is ALL["opd"]
    half = find("0.5*sft")
    stats = TokenStats(logp=torch.tensor([-1.0]))
    assert half(stats, None)[0].tolist() == [0.5]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ppo+", r"ppo\+:  is no term of a sum"),
        ("-1*ppo", r"-1\*ppo is no term of a sum"),
        ("x*ppo", "could not convert string to float: 'x'"),
        ("ppo+nope", "actor.objective=nope; choose one of"),
    ],
)
def test_sums_that_are_no_sums(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find(name)


def test_terms_from_files_and_what_they_cannot_share(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    (tmp_path / "own.py").write_text(OWN)
    assert find(f"{folder}/own.py:mine").needs == ("logp",)  # a plus in a path is no sum
    name = f"sft+0.1*{tmp_path}/own.py:mine"
    stats = TokenStats(logp=torch.tensor([-1.0]))
    loss_T, metrics = find(name)(stats, None, clip=2.0)  # type: ignore[arg-type]
    assert loss_T.tolist() == pytest.approx([1.2])
    assert metrics.keys() == {"loss_sft", "clipped", "loss_mine"}
    with pytest.raises(ConfigError, match="both read clip, with the defaults"):
        find(f"ppo+{tmp_path}/own.py:mine")
    with pytest.raises(ConfigError, match="beta and share would be two values of beta"):
        find(f"gkd+{tmp_path}/own.py:other")
