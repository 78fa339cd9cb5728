"""The audit finds what is wrong with an environment, and nothing where nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from RL2.errors import UserError
from RL2.tools.audit import audit
from RL2.tools.cli import app

GSM8K = Path(__file__).parents[3] / "envs" / "gsm8k.py"

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


PARTS = """{
        "format": bool(found), "length": -len(action) / 100, "correct": SCALE, "words": 0.1 * ("think" in action)
    }"""


def composite(text: str, scale: str = "reward") -> str:
    """The environment with its reward as one part among others, which are about form."""
    return text.replace('"reward": reward', f'"reward": {PARTS.replace("SCALE", scale)}')


@pytest.mark.parametrize("scale", ["reward", "bool(reward)", "2 * reward - 1", "3 * reward"])
def test_parts_that_are_about_form_are_no_holes(scale: str, tmp_path: Path, plain: str) -> None:
    found = audit(script(tmp_path, composite(CORRECT, scale)), plain)
    assert not found.findings
    assert found.notes[0] == "audited for correctness: correct"
    assert found.notes[1].startswith("not audited: format, length, words (pays right answers no more than others")


def test_form_is_no_hole_where_all_answers_are_the_same(tmp_path: Path) -> None:
    (file := tmp_path / "same.jsonl").write_text('{"prompt": "2+5=", "extra_info": {"answer": "7"}}\n' * 4)
    found = audit(script(tmp_path, composite(CORRECT)), str(file))
    assert not found.findings
    assert found.notes[0] == "audited for correctness: correct"


@pytest.mark.parametrize("value", [0.05, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", ["reward", "2 * reward - 1"])
@pytest.mark.parametrize(("response", "kind"), [("''", "nothing"), ("state", "the prompt again")])
def test_what_a_part_pays_for_no_answer_is_a_hole_however_little(
    response: str, kind: str, scale: str, value: float, tmp_path: Path, plain: str
) -> None:
    text = composite(CORRECT, f"{value} if action == {response} else {scale}")
    found = audit(script(tmp_path, text), plain)
    assert {(finding.part, finding.kind) for finding in found.findings} == {("correct", kind)}


def test_form_that_makes_a_wrong_answer_correct_is_said(tmp_path: Path, plain: str) -> None:
    found = audit(script(tmp_path, composite(CORRECT)), plain)
    assert "a wrong answer earns up to 0.94 in all, and what earns more than 0 counts as correct" in found.notes[2]
    alone = CORRECT.replace('"reward": reward', '"reward": {"correct": reward}')
    assert audit(script(tmp_path, alone), plain).notes == ["audited for correctness: correct"]


@pytest.mark.parametrize("scale", ["reward", "2 * reward - 1"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "exception counted as 0"])
def test_a_hole_in_one_part_is_named(fault: str, scale: str, tmp_path: Path, plain: str) -> None:
    right, wrong, kind = FAULTS[fault]
    text = CORRECT.replace(right, wrong)
    if fault == "unicode digits":
        text = text.replace("found[-1] == str(gold)", "int(float(found[-1])) == float(found[-1]) == int(gold)")
    found = audit(script(tmp_path, composite(text, scale)), plain)
    assert {finding.part for finding in found.findings} == {"correct"}
    assert any(finding.kind == kind and finding.row and finding.response for finding in found.findings)


def test_of_two_correct_parts_the_one_with_the_hole_is_named(tmp_path: Path, plain: str) -> None:
    both = CORRECT.replace('"reward": reward', '"reward": {"strict": reward, "lenient": float(str(gold) in action)}')
    result = CliRunner().invoke(
        app, ["audit-env", str(script(tmp_path, both)), "--data", plain], env={"COLUMNS": "300"}
    )
    assert result.exit_code == 1
    assert "(reward: lenient)" in result.output
    assert "row 1, answer 12: '#### 312' got lenient 1" in result.output
    strict = ["audit-env", str(script(tmp_path, both)), "--data", plain, "--part", "strict"]
    assert CliRunner().invoke(app, strict).exit_code == 0


def test_a_part_that_pays_every_answer_has_to_be_named(tmp_path: Path, plain: str) -> None:
    """It looks like a part that is about form."""
    always = composite(CORRECT.replace("found[-1] == str(gold)", "True"))
    with pytest.raises(UserError, match=r"no part of its reward \(format, length, correct, words\) pays right answers"):
        audit(script(tmp_path, always), plain)
    found = audit(script(tmp_path, always), plain, parts=["correct"])
    assert {finding.part for finding in found.findings} == {"correct"}
    assert (1, "another problem's answer", "#### 7") in {(f.row, f.kind, f.response) for f in found.findings}


def test_a_part_that_is_not_there_is_refused(tmp_path: Path, plain: str) -> None:
    with pytest.raises(UserError, match=r"nothing of corect .*; its parts are format, length, correct, words"):
        audit(script(tmp_path, composite(CORRECT)), plain, parts=["corect"])
    with pytest.raises(UserError, match="its reward has no parts"):
        audit(script(tmp_path, CORRECT), plain, parts=["correct"])


TURNS = """
async def step(state, action, extra_info):
    answer = extra_info["answer"]
    if answer is None:
        raise ValueError("no answer")
    right = action.strip().endswith(f"#### {answer}")
    done = DONE
    reward = float(right and done)
    return {"next_state": state + action, "reward": reward, "score": reward, "done": done, "extra_info": extra_info}
"""


def test_responses_that_do_not_end_the_episode_are_not_taken_for_unpaid(tmp_path: Path, plain: str) -> None:
    env = script(tmp_path, TURNS.replace("DONE", 'action.startswith("####")'))
    found = audit(env, plain)
    assert found.findings == []
    assert [note.replace(str(env), "ENV").replace(plain, "DATA") for note in found.notes] == [
        "20 responses do not end the episode (done is false). An audit sees the first turn only; play several with "
        "rl2 play ENV --data DATA"
    ]


def test_an_environment_that_never_ends_in_its_first_turn_is_for_rl2_play(tmp_path: Path, plain: str) -> None:
    with pytest.raises(UserError, match=r"The episode goes on \(done is false\)\. .* play several with rl2 play "):
        audit(script(tmp_path, TURNS.replace("DONE", '"tool" in state')), plain)
