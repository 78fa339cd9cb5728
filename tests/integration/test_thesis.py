"""`rl2 reproduce thesis`, with runs of a few steps: everything is run, judged and shown, and nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from RL2.tools.cli import app
from RL2.tools.reproduce import thesis
from RL2.tools.reproduce.claims import Claim
from RL2.tools.reproduce.demo import Plan, ProgressBoard

SIZES = {"test_rows": 8, "sequences_per_step": 32, "warmup_batch": 8}
PLAN = Plan(warmup_steps=4, steps=5, test_freq=2, methods=thesis.METHODS, **SIZES)


@pytest.fixture(scope="module")
def done(warm_jobs: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Claim]]:
    out = tmp_path_factory.mktemp("thesis")
    return out, thesis.reproduce(out, 1, ProgressBoard(), PLAN)


def test_the_page_has_every_claim_method_and_section(done: tuple[Path, list[Claim]]) -> None:
    out, found = done
    page = (out / "thesis.html").read_text()
    assert len(found) == len(list(dict.fromkeys(claim.text for claim in found))) > 12
    for text in (*(claim.text for claim in found), *(of.title for of in thesis.ALL)):
        assert text in page
    for section in (*(section.number for section in thesis.SECTIONS), "4.4"):
        assert f"<h2>{section} " in page
    # one seed and so few steps say nothing about seeds
    assert {claim.verdict for claim in found if claim.section in ("3.1", "3.2", "3.3", "4.2")} == {"cannot tell"}
    report = json.loads((out / "thesis.json").read_text())
    assert set(report["methods"]) == {of.name for of in thesis.ALL}
    judged = [claim["text"] for claim in report["claims"] + report["questions"]]
    assert judged == [claim.text for claim in found]


def test_what_is_done_is_not_done_again(done: tuple[Path, list[Claim]]) -> None:
    """Only the run that an interruption left half done begins anew, and it comes out the same."""
    out, found = done
    home = out / "seed-0"
    times = {of.name: (home / of.name / "metrics.jsonl").stat().st_mtime_ns for of in thesis.ALL}
    (home / "rank_jsd" / "done.json").unlink()
    assert thesis.reproduce(out, 1, ProgressBoard(), PLAN) == found
    again = {of.name: (home / of.name / "metrics.jsonl").stat().st_mtime_ns for of in thesis.ALL}
    assert [name for name in times if times[name] != again[name]] == ["rank_jsd"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["proof"], "rl2 reproduce: proof: only `rl2 reproduce thesis` exists"),
        (["thesis", "--scale", "7b"], "rl2 reproduce: --scale 7b: choose tiny or 4b"),
    ],
)
def test_mistakes_are_named(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["reproduce", *arguments])
    assert (result.exit_code, str(result.exception)) == (1, said)


def test_commands_for_gpus_are_printed() -> None:
    result = CliRunner().invoke(app, ["reproduce", "thesis", "--scale", "4b", "--seeds", "1", "--nproc", "2"])
    assert result.exit_code == 0
    assert result.output.splitlines() == list(thesis.gpu_commands(1, 2))
