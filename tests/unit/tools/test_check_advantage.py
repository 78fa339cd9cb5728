"""`rl2 check-advantage` passes the library's estimators, and says of each in tests/advantages what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from RL2.batch.advantages import reinforce, rloo
from RL2.batch.estimator import Estimator, reads
from RL2.batch.registry import ESTIMATORS
from RL2.errors import ConfigError
from RL2.tools.check_advantage import assert_sound, check
from RL2.tools.cli import app
from RL2.types import TokenBatch

ROOT = Path(__file__).resolve().parents[3]
BROKEN = ROOT / "tests" / "advantages"


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_estimators_of_the_library_are_sound(name: str) -> None:
    assert_sound(name)


REASONS = {
    "first_of_group": {"invariance": r"an advantage is \S+, and \S+ after the samples of each group changed places"},
    "counts_on_whole_groups": {"contract": r"groups with unscored members: it raises RuntimeError: .*\.py:\d+\)"},
    "divides_by_zero": {"finite": r"every reward 0: an advantage is not finite; add a small number"},
    "draws": {
        "deterministic": r"two calls with the same rollout differ",
        "declaration": r"it reads .* without declaring it",
        "invariance": r"an advantage is",
    },
    "undeclared": {"declaration": r"it reads truncated without declaring it; write @reads\('rewards', 'truncated'\)"},
    "unread": {"declaration": r"it declares values and never reads it; remove it from @reads"},
    "rough_baseline": {"baseline": r"every reward \S+: an advantage is \S+; it claims a baseline"},
    "one_a_sequence": {"contract": r"groups of four: it returns torch.float64 \[18\]; it must be a tensor of floats"},
    "in_place": {"contract": r"it changes reward_T of the batch in place"},
    "unused_knob": {"knobs": r"the knob margin changes nothing \(tried 0.2, 0.05\)"},
}


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_estimator_fails_for_its_own_reason(name: str) -> None:
    failed = {f.name: f.reason for f in check(f"{BROKEN / name}.py:estimator") if not f.passed}
    assert failed.keys() == REASONS[name].keys(), failed
    for check_name, reason in REASONS[name].items():
        assert re.search(reason, failed[check_name]), failed[check_name]
        assert "\n" not in failed[check_name]


def test_every_broken_estimator_is_tried() -> None:
    assert {file.stem for file in BROKEN.glob("*.py")} == REASONS.keys()


def test_the_command_passes_and_fails() -> None:
    good = CliRunner().invoke(app, ["check-advantage", "reinforce", "norm_var=true"])
    assert (good.exit_code, good.output.count("pass")) == (0, 7)
    bad = CliRunner().invoke(app, ["check-advantage", f"{BROKEN}/unread.py:estimator"])
    assert (bad.exit_code, bad.output.count("FAIL")) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py:mine"], "adv.estimator=nowhere.py:mine: nowhere.py: there is no such file"),
        (
            ["median"],
            "adv.estimator=median; choose one of reinforce, gdpo, rloo, rae, remax, maxrl, opo, gpg, pass_at_k, "
            "best_of_group, soft_value, otb, branch, spo, gae, or path.py:function",
        ),
        (["gae", "clip=1"], "gae does not read clip; its knobs are gamma, lamda"),
        (["gae", "lamda=2"], "lamda=2; must be at least 0 and at most 1"),
    ],
)
def test_the_command_says_in_one_line_what_it_cannot_find(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["check-advantage", *arguments])
    assert (done.exit_code, done.output) == (1, f"rl2 check-advantage: {message}\n")


def test_a_declaration_names_what_can_be_read() -> None:
    with pytest.raises(ValueError, match="nothing to read: reward; choose from rewards, groups, values"):
        reads("reward")
    with pytest.raises(ValueError, match=r"the argument group_size goes with @reads\('groups'\)"):

        @reads("rewards")
        def function(batch: TokenBatch, *, group_size: int) -> None: ...


def test_an_estimator_without_a_declaration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def plain(batch):\n    return batch.reward_T\n")
    with pytest.raises(ConfigError, match=r"mine.py:plain: say what it reads, @reads\('rewards', ...\)"):
        check(f"{tmp_path}/mine.py:plain")


def test_an_estimator_is_frozen() -> None:
    assert isinstance(rloo, Estimator)
    assert reinforce.settings == ("global_norm", "norm_var", "std_over")
    assert ESTIMATORS["gae"].settings == ("gamma", "lamda", "global_norm", "norm_var")
    with pytest.raises(AttributeError):
        rloo.baseline = False  # type: ignore[misc]
