"""The audit finds what is wrong with an environment, and nothing where nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from RL2.cli import app
from RL2.config import UserError
from RL2.evaluation.audit import audit

GSM8K = Path(__file__).parents[2] / "envs" / "gsm8k.py"

CORRECT = """
import re

async def step(state, action, extra_info):
    gold = extra_info["answer"]
    if gold is None:
        raise ValueError("no answer")
    found = re.findall(r"#### (-?[0-9.]+)$", action, re.MULTILINE)
    reward = float(bool(found) and found[-1] == str(gold))
    return {"next_state": None, "reward": reward, "score": reward, "done": True, "extra_info": extra_info}
"""
FAULTS = {
    "substring": (
        "reward = float(bool(found) and found[-1] == str(gold))",
        "reward = float(bool(found) and str(gold) in found[-1])",
        "a number that contains the answer",
    ),
    "first instead of last": ("found[-1]", "found[0]", "another answer, corrected to the right one"),
    "tolerance": ("found[-1] == str(gold)", "abs(float(found[-1]) - float(gold)) < 1e-2", "a near miss"),
    "exception counted as 0": (
        'gold = extra_info["answer"]\n    if gold is None:\n        raise ValueError("no answer")',
        'gold = extra_info.get("answer")',
        "data without a right answer",
    ),
    "unicode digits": (r"-?[0-9.]+)", r"-?[\d.]+)", "digits of another script"),
    "the prompt's echo": ('$", action,', '$", state + action,', "the answer in the prompt alone"),
}


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Rows as of GSM8K."""
    rows = [
        {"question": f"What is {a} and {b}?", "answer": f"Add them: {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
        for a, b in ((3, 4), (10, 2), (600, 512), (0, 5), (7, 0))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def plain(tmp_path: Path) -> str:
    file = tmp_path / "plain.jsonl"
    rows = [{"prompt": f"{n}?", "extra_info": {"answer": str(n)}} for n in (12, 7, 105, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_nothing_is_wrong_with_gsm8k(data: str) -> None:
    found = audit(GSM8K, data)
    assert not found.findings
    assert found.rows == 5
    assert len(found.tried) == 23
    assert found.tried["the demonstration"] == 5


def script(folder: Path, text: str) -> Path:
    file = folder / "environment.py"
    file.write_text(text)
    return file


def test_nothing_is_wrong_before_the_faults_are_planted(tmp_path: Path, plain: str) -> None:
    assert not audit(script(tmp_path, CORRECT), plain).findings


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path, plain: str) -> None:
    right, wrong, kind = FAULTS[fault]
    assert CORRECT.count(right) == 1
    text = CORRECT.replace(right, wrong)
    if fault == "unicode digits":  # it compares numbers, as such graders do
        text = text.replace("found[-1] == str(gold)", "int(float(found[-1])) == float(found[-1]) == int(gold)")
    found = audit(script(tmp_path, text), plain)
    assert kind in {finding.kind for finding in found.findings}


@pytest.mark.parametrize("given", ["#### 12", "so \\boxed{ 12 }.", "<answer>12</answer>", "The answer is: 12"])
def test_a_prompt_that_gives_the_answer_is_found(given: str, tmp_path: Path, plain: str) -> None:
    rows = [{"prompt": "12?", "extra_info": {"answer": "12"}}, {"prompt": given, "extra_info": {"answer": "12"}}]
    file = tmp_path / "given.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    findings = audit(script(tmp_path, CORRECT), str(file)).findings
    assert (2, "the data's own prompt gives the answer") in {(finding.row, finding.kind) for finding in findings}
    assert {finding.row for finding in findings} == {2}


def test_a_solution_behind_the_question_is_refused(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "12?"}, {"role": "assistant", "content": "#### 12"}]
    file = tmp_path / "solved.jsonl"
    file.write_text(json.dumps({"messages": talk, "extra_info": {"answer": "12"}}))
    with pytest.raises(UserError, match="row 1: 'messages' end with the assistant"):
        audit(script(tmp_path, CORRECT), str(file))


def test_the_command(tmp_path: Path, plain: str, data: str) -> None:
    fine = CliRunner().invoke(app, ["audit-env", str(GSM8K), "--data", data])
    assert fine.exit_code == 0, fine.output
    right, wrong, _ = FAULTS["substring"]
    broken = script(tmp_path, CORRECT.replace(right, wrong))
    result = CliRunner().invoke(app, ["audit-env", str(broken), "--data", plain])
    assert result.exit_code == 1
    assert "is wrong about" in result.output
    missing = CliRunner().invoke(app, ["audit-env", str(GSM8K), "--data", plain, "--key", "gold"])
    assert "row 1: extra_info has no 'gold' (it has answer)" in missing.output


def test_where_no_answer_is_rewarded_nothing_can_be_said(tmp_path: Path, plain: str) -> None:
    never = script(tmp_path, CORRECT.replace("float(bool(found) and found[-1] == str(gold))", "0.0"))
    with pytest.raises(UserError, match="no reward for its own answer '12' in any of these forms"):
        audit(never, plain)
