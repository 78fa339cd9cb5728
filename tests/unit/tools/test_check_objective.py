"""The conformance kit passes what is sound, and says of each broken objective in tests/objectives what is wrong."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import warm
from omegaconf import OmegaConf
from typer.testing import CliRunner

from RL2.errors import ConfigError
from RL2.objectives.objective import Loss, needs
from RL2.objectives.registry import ALL, OBJECTIVES, PREFERENCES, TEACHER_OBJECTIVES
from RL2.tools.check_objective.main import assert_sound, check
from RL2.tools.check_objective.two_ranks import Pair
from RL2.tools.checking import assert_passed
from RL2.tools.cli import app
from RL2.types import TokenBatch, TokenStats

ROOT = Path(__file__).resolve().parents[3]
BROKEN = ROOT / "tests" / "objectives"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


@pytest.mark.parametrize("name", OBJECTIVES | PREFERENCES)
def test_the_objectives_of_the_library_are_sound(name: str, pair: Pair) -> None:
    assert_sound(name, pair=pair)


DIVERGENCES = {
    "opd": "kl_student_teacher",
    "opd_sampled": "kl_student_teacher",
    # a token alone in its sequence weighs 1 + gamma
    "iw_opd": "1.5 times kl_student_teacher, 2 times kl_student_teacher, 1.25 times kl_student_teacher",
    "gkd": "jsd",
    "forward_kl": "kl_teacher_student",
}


@pytest.mark.parametrize("name", TEACHER_OBJECTIVES)
def test_an_objective_with_a_teacher_has_the_expected_gradient_of_its_divergence(name: str, pair: Pair) -> None:
    findings = check(name, pair=pair)
    assert_passed(findings)
    assert (findings[-1].name, findings[-1].reason) == (
        "teacher",
        f"its expected gradient is that of {DIVERGENCES[name]}, and 0 where the student is the teacher",
    )


REASONS = {
    "nan_at_one": {"limits": r"the loss is not finite in float32 at p = 1 - 1e-12"},
    "batch_mean": {"invariance": r"the loss of a token is another one when .* remove every mean"},
    "unused_knob": {"knobs": r"the knob margin changes nothing \(tried 0.2, 0.05\)"},
    "wrong_closed_form": {"closed form": r"the closed form is \S+ where autograd finds \S+ \(the logit of the sampled"},
    "undeclared": {"statistics": r"it reads entropy without declaring it; write @needs\('logp', 'entropy'\)"},
    "sequence_loss": {"contract": r"one value per sequence, shape \[B\]: a sequence loss without weights"},
    "cut_graph": {"gradient": r"autograd says \S+ where finite differences of the loss say \S+"},
    "couples_sequences": {
        "weights": r"a sequence of weight 0 gets a gradient, through the losses of other sequences",
        "invariance": r"the loss of a token is another one when",
    },
    "counts_processes": {"invariance": r"two processes, each with some of the sequences, together have another sum"},
    "detached_divergence": {"teacher": r"its expected gradient is 0: a detached divergence as an advantage, .*top K"},
    "clamped_ratio": {"teacher": r"is that of kl_student_teacher only where .* are close: a clamped log-ratio"},
    "weighs_itself": {"weights": r"the loss depends on batch.weight_T"},
}


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_objective_fails_for_its_own_reason(name: str, pair: Pair) -> None:
    findings = check(f"{BROKEN / name}.py:objective", pair=pair)
    failed = {finding.name: finding.reason for finding in findings if not finding.passed}
    assert failed.keys() == REASONS[name].keys(), failed
    for of, reason in REASONS[name].items():
        assert re.search(reason, failed[of])


def test_every_broken_objective_has_a_reason() -> None:
    assert {file.stem for file in BROKEN.glob("*.py")} == REASONS.keys()


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mine.py of docs/own_objective.md, as it stands there."""
    (snippet,) = re.findall(
        r"```python\n# mine.py\n(.*?)```", (ROOT / "docs" / "own_objective.md").read_text(), re.DOTALL
    )
    body = snippet[snippet.index("@needs") :].strip()
    assert len(body.splitlines()) <= 10
    path = tmp_path_factory.mktemp("newcomer") / "mine.py"
    path.write_text(snippet)
    return path


def test_what_a_newcomer_writes_is_sound(newcomer: Path, pair: Pair) -> None:
    assert_sound(f"{newcomer}:focal", pair=pair)


@pytest.mark.parametrize("name", ALL)
def test_every_objective_has_a_card_with_its_defaults(name: str) -> None:
    page = (ROOT / "docs" / "objectives.md").read_text()
    (card,) = [card for card in page.split("\n### ")[1:] if f"`{name}`" in card.splitlines()[0]]
    (line,) = re.findall(r"- Knobs: (.*)", card)
    stated = OmegaConf.from_dotlist(re.findall(r"`(\w+=[^`]+)`", line))
    assert stated == ALL[name].defaults


def rl2(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return warm.run("RL2.tools.cli", *arguments, cwd=cwd, env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"})


@pytest.mark.slow
def test_the_command_passes_what_is_sound(newcomer: Path) -> None:
    done = rl2("check-objective", "mine.py:focal", "gamma=1.5", cwd=newcomer.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("pass") == 8
    assert "FAIL" not in done.stdout
    assert "gamma changes the result" in done.stdout


@pytest.mark.slow
def test_the_command_fails_what_is_not() -> None:
    done = rl2("check-objective", "sequence_loss.py:objective", cwd=BROKEN)
    assert done.returncode == 1
    assert done.stdout.count("FAIL") == 1
    assert "a sequence loss without weights" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py:focal"], r"nowhere.py: there is no such file"),
        ([f"{BROKEN / 'batch_mean.py'}:focal"], r"batch_mean.py has no function focal"),
        (["ppo", "clip"], r"'clip' is not a knob; write KNOB=VALUE"),
    ],
)
def test_the_command_says_in_one_line_what_it_cannot_find(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["check-objective", *arguments])
    assert done.exit_code == 1
    assert re.fullmatch(rf"rl2 check-objective: .*{message}.*\n", done.output)


def test_knobs_are_checked_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="ppo does not read gamma; its knobs are clip, clip_high, dual_clip"):
        check("ppo", {"gamma": 1})
    with pytest.raises(ConfigError, match="clip='wide'; expected a number"):
        check("ppo", {"clip": "wide"})
    with pytest.raises(ConfigError, match="say what it reads"):
        check(lambda stats, batch: (-stats.logp, {}))


@needs("teacher_logp", "logp")
def regresses(stats: TokenStats, batch: TokenBatch) -> Loss:
    return (stats.logp - stats.teacher_logp).square(), {}


def test_an_objective_may_belong_to_a_multiple_of_a_divergence(pair: Pair) -> None:
    findings = check(regresses, pair=pair)
    assert_passed(findings)
    said = "its expected gradient is that of 2 times kl_student_teacher, and 0 where the student is the teacher"
    assert findings[-1].reason == said


@needs("kl_student_teacher", "kl_teacher_student")
def in_both_directions(stats: TokenStats, batch: TokenBatch) -> Loss:
    return stats.kl_student_teacher + stats.kl_teacher_student, {}


def test_an_objective_may_belong_to_no_divergence(pair: Pair) -> None:
    findings = check(in_both_directions, pair=pair)
    assert_passed(findings)
    assert findings[-1].reason == "its expected gradient is not that of a single divergence of the menu"


@needs("logp")
def averages(stats: TokenStats, batch: TokenBatch) -> Loss:
    return -stats.logp.mean(), {}


@needs("logp")
def wants_an_old_policy(stats: TokenStats, batch: TokenBatch) -> Loss:
    return (stats.logp - batch.old_logp_T).exp(), {}  # type: ignore[operator]


@needs("logp")
def draws(stats: TokenStats, batch: TokenBatch) -> Loss:
    return -stats.logp * torch.rand_like(stats.logp), {}


@needs("logp")
def without_default(stats: TokenStats, batch: TokenBatch, *, clip: float) -> Loss:
    return -stats.logp * clip, {}


@needs("logp")
def without_star(stats: TokenStats, batch: TokenBatch, clip: float = 0.2) -> Loss:
    return -stats.logp * clip, {}


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (averages, r"the loss is a single number: it averages by itself"),
        (wants_an_old_policy, r"on a fresh rollout, .* it raises TypeError: .* \(.*test_check_objective.py:\d+\)"),
        (draws, r"two calls with the same input give different losses"),
        (without_default, r"the knob clip needs an annotation and a default"),
        (without_star, r"knobs come after the star"),
    ],
)
def test_a_broken_contract_is_the_only_finding(objective: object, reason: str) -> None:
    (finding,) = check(objective)  # type: ignore[arg-type]
    assert (finding.name, finding.passed) == ("contract", False)
    assert re.search(reason, finding.reason)


@needs("logp", "log1mp")
def constant_factor(stats: TokenStats, batch: TokenBatch, *, gamma: float = 2.0) -> Loss:
    return -(gamma * stats.log1mp).exp().detach() * stats.logp, {}


def test_a_detached_factor_is_a_constant_for_the_gradient_check(pair: Pair) -> None:
    """Given as a function, which the two processes import from this module."""
    assert_sound(constant_factor, pair=pair)


@pytest.mark.slow
def test_an_objective_that_other_processes_cannot_import_is_told_so(pair: Pair) -> None:
    @needs("logp")
    def local(stats: TokenStats, batch: TokenBatch) -> Loss:
        return -stats.logp, {}

    with pytest.raises(AssertionError, match=r"invariance: in two processes: .* define it at the top of a module"):
        assert_sound(local, pair=pair)
    assert_sound("reinforce", pair=pair)  # the pair serves on


@pytest.mark.slow
def test_a_process_that_dies_is_reported_and_replaced(pair: Pair) -> None:
    pair.processes[1].kill()
    pair.processes[1].join()
    with pytest.raises(AssertionError, match=r"invariance: in two processes: one of the two processes died"):
        assert_sound("sft", pair=pair)
    assert_sound("sft", pair=pair)
