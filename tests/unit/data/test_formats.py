"""Rows as public data sets have them, with invented content: what becomes of each, and the table of docs/data.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.data.bad_rows import BadRows
from RL2.data.formats import FORMATS, canonical
from RL2.data.preference import load_pairs
from RL2.data.prompts import load_prompts
from RL2.data.sft import load_examples
from RL2.data.source import DataError
from RL2.rollout.environment import load_example

ROOT = Path(__file__).parents[3]
Q, A, B = "A colour?", "Green.", "Dog."


def user(text: str = Q) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str = A) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def turns(*texts: str, **more: Any) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text, **more} for n, text in enumerate(texts)]


def u(text: str = Q) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n"


SYSTEM, H = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>assistant\n"
ONE = f"{u()}{H}[Green.<|im_end|>]"
PAIR = [ONE, f"{u()}{H}[Dog.<|im_end|>]"]
VERL = {
    "data_source": "sums",
    "prompt": [user("1+1?")],
    "ability": "math",
    "extra_info": {"index": 0, "split": "train"},
}
SUM = (f"{u('1+1?')}{H}", "2")
GSM8K = (
    f"{u('1+1?' + chr(10) + 'Reason step by step. End with ' + repr('#### ') + ' and the answer as a number.')}"
    f"{H}[1+1=2\n#### 2<|im_end|>]"
)

HEAD, BODY = 'def two():\n    """Two."""\n', "    return 1 + 1\n"
HUMAN_EVAL = {"task_id": "T/0", "prompt": HEAD, "canonical_solution": BODY, "entry_point": "two"}
HUMAN_EVAL["test"] = "def check(candidate):\n    assert candidate() == 2\n"
MBPP = {"task_id": 1, "text": "Write two.", "code": HEAD + BODY, "test_list": ["assert two() == 2"]}
MBPP |= {"test_setup_code": "", "challenge_test_list": []}
SANITIZED = {"source_file": "f", "task_id": 1, "prompt": "Write two.", "code": HEAD + BODY, "test_imports": []}
SANITIZED |= {"test_list": ["assert two() == 2"]}
IN_AND_OUT = json.dumps({"inputs": ["1 1\n"], "outputs": ["2\n"]})

CASES: dict[str, list[tuple[str, str, dict[str, Any], Any]]] = {
    # rows as in: (program, script, row, what it trains on, or prompt and answer, or why it is refused)
    "Alpaca": [("sft", "", {"instruction": "Name one.", "input": Q, "output": A}, ONE.replace(Q, f"Name one.\n{Q}"))],
    "Alpaca with history (LLaMA-Factory)": [
        (
            "sft",
            "",
            {"instruction": Q, "input": "", "output": A, "system": "Be brief.", "history": [["1?", "2"]]},
            f"{SYSTEM}{u('1?')}{H}[2<|im_end|>]\n{ONE}",
        )
    ],
    "Dolly": [("sft", "", {"instruction": Q, "context": "", "response": A, "category": "c"}, ONE)],
    "ShareGPT, OpenHermes": [("sft", "", {"conversations": turns(Q, A)}, ONE)],
    "SlimOrca": [
        (
            "sft",
            "",
            {"conversations": [*turns("1?", "2", weight=0), *turns(Q, A, weight=1)]},
            f"{u('1?')}{H}2<|im_end|>\n{ONE}",
        )
    ],
    "OpenThoughts": [("sft", "", {"system": "Be brief.", "conversations": turns(Q, A)}, SYSTEM + ONE)],
    "ShareGPT pairs (LLaMA-Factory)": [
        ("dpo", "", {"conversations": turns(Q), "chosen": turns("", A)[1], "rejected": turns("", B)[1]}, PAIR)
    ],
    "OpenAI fine-tuning": [
        (
            "sft",
            "",
            {"messages": [user(), {"role": "assistant", "content": [{"type": "text", "text": A}], "weight": 1}]},
            ONE,
        )
    ],
    "OpenAI preferences": [
        (
            "dpo",
            "",
            {
                "input": {"messages": [user()], "tools": []},
                "preferred_output": [said()],
                "non_preferred_output": [said(B)],
            },
            PAIR,
        )
    ],
    "Tulu 3": [("sft", "", {"id": "x", "messages": [user(), said()], "source": "s"}, ONE)],
    "UltraChat": [("sft", "", {"id": "0", "data": [Q, A]}, ONE)],
    "UltraChat 200k": [("sft", "", {"prompt": Q, "prompt_id": "p", "messages": [user(), said()]}, ONE)],
    "UltraFeedback binarized": [
        (
            program,
            "",
            {"prompt": Q, "chosen": [user(), said()], "rejected": [user(), said(B)], "messages": [user(), said()]},
            expected,
        )
        for program, expected in (("dpo", PAIR), ("sft", ONE))
    ],
    "HH-RLHF": [
        (
            "dpo",
            "",
            {key: f"\n\nHuman: {Q}\n\nAssistant: {text}" for key, text in (("chosen", A), ("rejected", B))},
            PAIR,
        )
    ],
    "Orca pairs": [
        (
            "dpo",
            "",
            {"system": "Be brief.", "question": Q, "chosen": A, "rejected": B},
            [SYSTEM + side for side in PAIR],
        )
    ],
    "Skywork preferences": [
        ("dpo", "", {"chosen": [user(), said()], "rejected": [user(), said(B)], "source": "s"}, PAIR)
    ],
    "TRL preferences": [("dpo", "", {"prompt": [user()], "chosen": [said()], "rejected": [said(B)]}, PAIR)],
    "TRL prompt and completion": [
        ("sft", "", {"prompt": "Sky:", "completion": " blue"}, "Sky:[ blue<|im_end|>]"),
        ("sft", "", {"prompt": [user()], "completion": [said()]}, ONE),
    ],
    "TRL unpaired (KTO)": [
        ("sft", "", {"prompt": [user()], "completion": [said()], "label": True}, ONE),
        ("sft", "", {"prompt": [user()], "completion": [said()], "label": False}, DataError("its 'label' is false")),
    ],
    "MetaMathQA": [("sft", "", {"query": Q, "response": A, "type": "t"}, ONE)],
    "OpenOrca": [("sft", "", {"id": "x", "system_prompt": "Be brief.", "question": Q, "response": A}, SYSTEM + ONE)],
    "FLAN": [("sft", "", {"inputs": Q, "targets": A}, ONE)],
    "NuminaMath": [("sft", "", {"source": "s", "problem": Q, "solution": A, "messages": [user(), said()]}, ONE)],
    "OpenR1-Math": [
        ("ppo", "orz", {"problem": "1+1?", "solution": "2", "answer": "2", "messages": [user("1+1?"), said("2")]}, SUM)
    ],
    "GSM8K": [
        ("ppo", "gsm8k", {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, SUM),
        (
            "sft",
            "gsm8k",
            {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"},
            GSM8K,
        ),
        ("sft", "", {"question": "1+1?", "answer": "1+1=2\n#### 2"}, DataError("neither 'prompt' nor 'messages'")),
    ],
    "MATH": [("ppo", "orz", {"problem": "1+1?", "level": "1", "type": "t", "solution": "It is $\\boxed{2}$."}, SUM)],
    "SVAMP": [
        (
            "ppo",
            "gsm8k",
            {"Body": "One.", "Question": "1+1?", "Answer": "2"},
            (SUM[0].replace("1+1?", "One. 1+1?"), "2"),
        )
    ],
    "AQuA": [
        (
            "ppo",
            "orz",
            {"question": "1+1?", "options": ["A)1", "B)2"], "rationale": "r", "correct": "B"},
            (SUM[0].replace("1+1?", "1+1?\nA)1\nB)2"), "B"),
        )
    ],
    "DAPO-Math-17k, verl": [
        ("ppo", script, VERL | {"reward_model": {"style": "rule", "ground_truth": "2"}}, SUM)
        for script in ("orz", "gsm8k")
    ],
    "DAPO-Math (slime)": [("ppo", "orz", {"prompt": [user("1+1?")], "label": "2"}, SUM)],
    "Search-R1": [
        (
            "ppo",
            "searchr1",
            VERL | {"question": "1+1?", "golden_answers": ["2"], "reward_model": {"ground_truth": {"target": ["2"]}}},
            (SUM[0], ["2"]),
        )
    ],
    "Countdown": [("ppo", "countdown", {"target": 3, "nums": [1, 2]}, ("equals 3", None))],
    "HumanEval": [
        ("ppo", "code", HUMAN_EVAL, ("Complete this function.", None)),
        ("sft", "", HUMAN_EVAL, f"{HEAD}[{BODY}<|im_end|>]"),
    ],
    "MBPP": [
        ("ppo", "code", MBPP, ("Write two.\nThe code should pass tests such as\nassert two() == 2\n", None)),
        ("sft", "", MBPP, f"{u('Write two.')}{H}[{HEAD}{BODY}<|im_end|>]"),
    ],
    "MBPP sanitized": [
        ("ppo", "code", SANITIZED, ("Write two.\nThe code should pass tests such as\nassert two() == 2\n", None)),
        ("sft", "", SANITIZED, f"{u('Write two.')}{H}[{HEAD}{BODY}<|im_end|>]"),
    ],
    "APPS": [
        (
            "ppo",
            "code",
            {"problem_id": 0, "question": Q, "solutions": "[]", "input_output": IN_AND_OUT, "difficulty": "d"},
            (Q, None),
        )
    ],
    "PRIME's code, verl": [
        ("ppo", "code", VERL | {"prompt": [user()], "reward_model": {"ground_truth": IN_AND_OUT}}, (Q, None))
    ],
    "TRL prompts": [("ppo", "", {"prompt": [user("1+1?")], "answer": "2"}, SUM)],
    "OpenR1-Math without a script": [
        (
            "ppo",
            "",
            {"messages": [user("1+1?"), said("2")], "answer": "2"},
            DataError("'messages' end with the assistant"),
        )
    ],
    "SafeRLHF": [
        ("dpo", "", {"prompt": Q, "response_0": A, "response_1": B, "better_response_id": 0}, DataError("no 'chosen'"))
    ],
    "texts for pretraining": [
        ("sft", "", {"text": A}, DataError("neither 'prompt' nor 'messages'; its keys are text"))
    ],
}
FLAT = [(name, *case) for name, cases in CASES.items() for case in cases]


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> str:
    text, before = "", False
    for token, trained in zip(ids, mask, strict=True):
        text += "[" * (trained > before) + "]" * (before > trained) + str(tokenizer.decode([token]))
        before = trained
    return text + "]" * before


def read(program: str, script: str, row: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What the program makes of the row, and the format that was seen."""
    (file := folder / "rows.jsonl").write_text(json.dumps(row))
    example = load_example(ROOT / "envs" / f"{script}.py") if script else None
    bad = BadRows(str(file))
    if program == "sft":
        ((trajectory,), _) = load_examples(str(file), tokenizer, example, 9999, bad=bad)
        (sequence,) = trajectory.sequences
        return marked(tokenizer, sequence.token_ids.tolist(), sequence.action_mask.tolist()), bad
    if program == "dpo":
        ((pair,), _) = load_pairs(str(file), tokenizer, example, 9999, bad=bad)
        return [marked(tokenizer, *side) for side in pair], bad
    (prompt,) = load_prompts(str(file), tokenizer, example, 9999, bad)
    return (prompt.text, prompt.extra_info.get("answer")), bad


@pytest.mark.parametrize(("name", "program", "script", "row", "expected"), FLAT)
def test_what_becomes_of_a_row(
    name: str,
    program: str,
    script: str,
    row: dict[str, Any],
    expected: Any,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CODE_ALLOW_UNSAFE", "true")  # nothing is run here, on whatever machine
    if isinstance(expected, DataError):
        with pytest.raises(DataError, match=re.escape(str(expected))) as error:
            read(program, script, row, tmp_path, tokenizer)
        assert "\n" not in str(error.value)
        return
    found, bad = read(program, script, row, tmp_path, tokenizer)
    if program == "ppo":
        text, answer = found
        assert answer == expected[1]
        # scripts add an instruction of their own behind the question
        start, _, end = expected[0].partition("<|im_end|>")
        assert start in text and (not end or text.endswith(f"<|im_end|>{end}"))
        return
    assert found == expected
    notes = bad.notes(None)
    assert len(notes) == (canonical(row)[1] != "" and not script)


def table() -> str:
    """The table of the docs, of these cases."""
    lines = ["| rows as in | keys | program | how |", "|---|---|---|---|"]
    for name, program, script, row, expected in FLAT:
        program = {"dpo": "`rm`, `dpo`", "ppo": "reinforcement learning", "sft": "`sft`"}[program]
        how = f"through `envs/{script}.py`" if script else canonical(row)[1] or "as is"
        if isinstance(expected, DataError):
            how = f"refused: {expected}"
        lines.append(f"| {name} | `{', '.join(row)}` | {program} | {how} |")
    return "\n".join(lines)


def test_the_table_of_the_docs_is_of_these_cases() -> None:
    assert table() in (ROOT / "docs" / "data.md").read_text(), f"docs/data.md should have\n{table()}"


def test_every_format_is_tried() -> None:
    seen = {name for _, _, script, row, _ in FLAT if not script for name in canonical(row)[1].split(" + ") if name}
    assert seen | {"verl (reward_model.ground_truth)"} == set(FORMATS)


@pytest.mark.parametrize("label", ["False", "false", " FALSE ", "0", 0, 0.0])
def test_a_bad_completion_is_no_demonstration_however_its_label_is_written(
    label: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """CSV has no booleans, and many tables have integers for them."""
    with pytest.raises(DataError, match="its 'label' is false"):
        read("sft", "", {"prompt": "q", "completion": "a", "label": label}, tmp_path, tokenizer)
    for good in ("True", "true", "1", 1):
        read("sft", "", {"prompt": "q", "completion": "a", "label": good}, tmp_path, tokenizer)


def test_an_answer_that_arrow_filled_in_with_null_is_none() -> None:
    """Where some rows have it in extra_info and others in a column."""
    row = {"prompt": "q", "extra_info": {"answer": None, "index": 3}, "answer": "2"}
    assert canonical(row)[0]["extra_info"] == {"answer": "2", "index": 3}


def test_an_answer_of_0_is_no_label(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for answer in ("0", 0, "False"):
        assert read("sft", "", {"prompt": "1-1=", "response": "0", "label": answer}, tmp_path, tokenizer)[0]


def test_calls_in_share_gpt() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Tide?"},
            {"from": "function_call", "value": '{"name": "tide", "arguments": {"of": "Pell"}}'},
            {"from": "observation", "value": "06:12"},
            {"from": "gpt", "value": "At 06:12."},
        ],
        "tools": "[]",
    }
    made, _ = canonical(row)
    assert [message["role"] for message in made["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert made["messages"][1]["tool_calls"] == [{"name": "tide", "arguments": {"of": "Pell"}}]
    assert made["tools"] == "[]"
    with pytest.raises(DataError, match="a turn is from 'narrator'; known are human, user"):
        canonical({"conversations": [{"from": "narrator", "value": "x"}]})


def test_our_own_rows_stay_as_they_are() -> None:
    """Whatever other columns they have."""
    for row in (
        {"prompt": "q", "response": "a", "question": "x", "instruction": "y"},
        {"messages": [user(), said()], "output": "x", "query": "y"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"},
        {"prompt": [user()], "chosen": [said()], "rejected": [said(B)]},
        {"prompt": "q", "extra_info": {"answer": "2"}, "answer": "3", "label": "4"},
    ):
        assert canonical(row) == (row, "")
