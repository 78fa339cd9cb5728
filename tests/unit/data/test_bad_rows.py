"""Rows that cannot be used: all are named at once, or the run goes on without them and lists them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.config.scripts import ScriptError
from RL2.data.bad_rows import BadRows
from RL2.data.preference import load_pairs
from RL2.data.prompts import load_prompts
from RL2.data.sft import load_examples
from RL2.data.source import DataError
from RL2.rollout.environment import load_example

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD: dict[str, Any] = {"prompt": "q", "response": "a", "chosen": "a", "rejected": "b"}
BAD: list[Any] = [
    b"{broken",
    b"[1]",
    b'{"prompt": "\xff"}',
    {"question": "q"},
    {**GOOD, "prompt": " "},
    {**GOOD, "prompt": 3},
    {**GOOD, "prompt": "\ud800"},
    {**GOOD, "prompt": None, "messages": [{"content": "q"}]},
    {**GOOD, "prompt": None, "messages": [USER, {"role": "user", "content": [{"type": "image"}]}]},
    {**GOOD, "prompt": None, "messages": [USER, ASSISTANT]},
    {**GOOD, "raises": True},
]
"""Of every kind: lines, keys, values, what the template and what the script make of it; bad in all programs."""


def example(row: dict[str, Any]) -> dict[str, Any] | None:
    if "raises" in row:
        raise KeyError("answer")
    return None if "leave out" in row else row


def prompts(path: str, tokenizer: PreTrainedTokenizerBase, bad: BadRows) -> list[int]:
    return [prompt.row for prompt in load_prompts(path, tokenizer, example, 100, bad)]


def examples(path: str, tokenizer: PreTrainedTokenizerBase, bad: BadRows) -> list[int]:
    return [trajectory.row for trajectory in load_examples(path, tokenizer, example, 100, bad=bad)[0]]


def pairs(path: str, tokenizer: PreTrainedTokenizerBase, bad: BadRows) -> list[int]:
    return [-1 for _ in load_pairs(path, tokenizer, example, 100, bad=bad)[0]]


LOADERS: dict[str, Callable[[str, PreTrainedTokenizerBase, BadRows], list[int]]] = {
    "ppo": prompts,
    "sft": examples,
    "dpo": pairs,
}


def write(folder: Path, rows: list[Any]) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (file := folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return str(file)


@pytest.mark.parametrize("program", LOADERS)
def test_a_run_skips_and_lists_bad_rows(program: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row for bad in BAD for row in (GOOD, bad)] + [{"leave out": 1}, GOOD]
    path, listing = write(tmp_path, rows), tmp_path / "skipped_rows.jsonl"
    bad = BadRows(path, skip=True)
    kept = LOADERS[program](path, tokenizer, bad)
    good = [number for number, row in enumerate(rows) if row is GOOD]
    assert kept == (good if program != "dpo" else [-1] * len(good))
    assert bad.notes(listing) == [
        f"{path}: example(row) left out 1 of {len(rows)} rows",
        f"{path}: {len(BAD)} of {len(rows)} rows cannot be used and are skipped; {listing} lists them",
    ]
    listed = [json.loads(line) for line in listing.read_text().splitlines()]
    assert [line["row"] for line in listed] == [2 * n + 2 for n in range(len(BAD))]
    assert all(line["path"] == path and line["error"] for line in listed)


@pytest.mark.parametrize("program", LOADERS)
def test_a_run_that_stops_names_them_all_at_once(
    program: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path, [GOOD, BAD[0], GOOD, BAD[3], BAD[-1]])
    with pytest.raises(DataError) as error:
        LOADERS[program](path, tokenizer, BadRows(path, key="data.on_bad_row"))
    said = str(error.value)
    assert said.startswith(f"{path}, row 2: line 2: Expecting property name")
    assert "; row 4: " in said and "; row 5: example(row) failed with KeyError" in said
    assert said.endswith(" (3 of 5 rows cannot be used); data.on_bad_row=skip continues without such rows")
    path = write(tmp_path, [GOOD, *[BAD[3]] * 9])
    with pytest.raises(DataError, match=r"row 6: .*\(9 of 10 rows cannot be used, the first 5 of them shown\)$"):
        LOADERS[program](path, tokenizer, BadRows(path))


@pytest.mark.parametrize("program", LOADERS)
def test_nothing_left_is_an_error_in_any_case(program: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, BAD[:2])
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        LOADERS[program](path, tokenizer, BadRows(path, skip=True))
    path = write(tmp_path, [{"leave out": 1}] * 2)
    with pytest.raises(DataError, match=r"example\(row\) leaves out all 2 rows"):
        LOADERS[program](path, tokenizer, BadRows(path, skip=True))


def test_what_is_wrong_with_every_row_is_said_of_the_first(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    path = write(tmp_path, [GOOD, {"messages": [USER]}, {"messages": [USER]}])
    with pytest.raises(DataError, match=r"row 2: the tokenizer has no chat template; [^;]*$"):
        load_prompts(path, plain, None, 100, BadRows(path, skip=True))


def test_a_script_with_example_alone_converts_rows(tmp_path: Path) -> None:
    (script := tmp_path / "convert.py").write_text("def example(row):\n    return {'prompt': row['q']}\n")
    assert load_example(script)({"q": "1"}) == {"prompt": "1"}
    script.write_text("async def step(state, action, extra_info):\n    pass\n")
    with pytest.raises(ScriptError, match=r"has no `def example\(row\)`"):
        load_example(script)
