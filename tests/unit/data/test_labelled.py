from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from RL2.data.labelled import Labelled, load_labelled
from RL2.data.source import DataError
from RL2.data.table import Ragged
from RL2.trainer.supervised import Rows
from RL2.trainer.unpaired import mismatch


def load(folder: Path, tokenizer: PreTrainedTokenizerBase, *rows: Any) -> tuple[Labelled, list[str]]:
    path, notes = folder / "a.jsonl", list[str]()
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_labelled(str(path), tokenizer, None, 60, notes)[0], notes


def test_the_rows_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    found, notes = load(
        tmp_path,
        tokenizer,
        {"prompt": "1+1=", "completion": "2", "label": True},
        {"prompt": "1+1=", "completion": "3", "label": False},
        {"prompt": "1+1=", "completion": "3", "label": "false"},
        {"prompt": "1+1=", "response": "2", "label": 1},
        {"messages": chat, "label": False},
        {"prompt": chat[:1], "completion": chat[1:], "label": 0},
    )
    assert [good for _, good in found] == [True, False, False, True, False, False]
    texts = [
        tokenizer.decode([token for token, trains in zip(ids, mask, strict=True) if trains]) for (ids, mask), _ in found
    ]
    assert texts == [f"{answer}<|im_end|>" for answer in "233222"]
    assert found[0][0] == found[3][0]
    assert found[4][0] == found[5][0]
    assert any("2 good and 4 bad responses" in note for note in notes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+1=", "response": "2"}, "no 'label', true or false"),
        ({"prompt": "1+1=", "response": "2", "label": "good"}, "'label' must be true or false"),
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3", "label": True}, "a pair; this loss reads single responses"),
    ],
)
def test_unusable_rows_are_refused(
    row: dict[str, Any], message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, tokenizer, row)


def rows(number: int) -> Rows:
    """Row n has the prompt [n, n] and the response [10 + n] * (n + 1)."""
    ids = [[n, n, *[10 + n] * (n + 1)] for n in range(number)]
    trains = [[False] * 2 + [True] * (n + 1) for n in range(number)]
    return Rows(Ragged.from_rows(ids, np.int32), Ragged.from_rows(trains, np.bool_), 1)


@pytest.mark.parametrize(
    ("number", "batch_size", "expected"),
    [(6, 3, [2, 0, 1, 5, 3, 4]), (5, 2, [1, 0, 4, 2, 3]), (4, 1, [3, 0, 1, 2]), (5, 9, [4, 0, 1, 2, 3])],
)
def test_each_prompt_gets_the_response_of_another_row_of_its_block(
    number: int, batch_size: int, expected: list[int]
) -> None:
    others = mismatch(rows(number), batch_size, "rows")
    for n, m in enumerate(expected):
        assert others.ids[n].tolist() == [n, n, *[10 + m] * (m + 1)]
        assert others.trains[n].tolist() == [False] * 2 + [True] * (m + 1)


def test_one_row_has_no_other() -> None:
    with pytest.raises(DataError, match=r"one row; the baseline of actor.loss=kto needs responses to other prompts"):
        mismatch(rows(1), 4, "rows")
