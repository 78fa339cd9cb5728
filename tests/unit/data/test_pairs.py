from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.data.preference import Pair, Pairs, load_pairs
from RL2.data.source import DataError
from RL2.trainer.supervised import Rows

USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def load(folder: Path, tokenizer: PreTrainedTokenizerBase, *rows: Any, max_length: int = 200) -> tuple[Pairs, int]:
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_pairs(str(path), tokenizer, None, max_length)


def shown(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> list[str]:
    """Of both, the text with a bar before the response."""
    texts = []
    for ids, mask in pair:
        start = mask.index(True)
        assert mask == [False] * start + [True] * (len(ids) - start)
        texts.append(f"{tokenizer.decode(ids[:start])}|{tokenizer.decode(ids[start:])}")
    return texts


def test_the_rows_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [f"{USER}1+1<|im_end|>\n{ASSISTANT}|2<|im_end|>", f"{USER}1+1<|im_end|>\n{ASSISTANT}|3<|im_end|>"]
    pairs, left_out = load(
        tmp_path,
        tokenizer,
        {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        {"chosen": turns("1+1", "2"), "rejected": turns("1+1", "3")},
        {"prompt": "1+1", "chosen": turns("1+1", "2"), "rejected": turns("1+1", "3")},
        {"prompt": turns("1+1"), "chosen": turns("", "2")[1:], "rejected": turns("", "3")[1:]},
        {"messages": turns("1+1"), "chosen": "2", "rejected": "3"},
        {"chosen": json.dumps(turns("1+1", "2")), "rejected": json.dumps(turns("1+1", "3"))},
    )
    assert left_out == 0
    assert shown(tokenizer, pairs[0]) == ["1+1=|2<|im_end|>", "1+1=|3<|im_end|>"]
    assert [shown(tokenizer, pair) for pair in pairs[1:]] == [chat] * 5


def test_rows_of_token_ids_are_used_as_they_are(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
    ids = {"prompt_ids": [5, 6, 7], "chosen_ids": [8], "rejected_ids": [9, 4]}
    pairs, left_out = load(tmp_path, tokenizer, ids, text, ids | {"chosen_ids": [8] * 300})
    assert left_out == 1, "it is too long"
    assert pairs[0] == (([5, 6, 7, 8], [False] * 3 + [True]), ([5, 6, 7, 9, 4], [False] * 3 + [True] * 2))
    assert shown(tokenizer, pairs[1]) == ["1+1=|2<|im_end|>", "1+1=|3<|im_end|>"]
    for wrong in ({"chosen_ids": []}, {"rejected_ids": [1.5]}, {"rejected_ids": None}, {"prompt_ids": "5"}):
        with pytest.raises(DataError, match="_ids must be a list of token ids, not "):
            load(tmp_path, tokenizer, ids | wrong)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("key", ["prompt", "messages"])
@pytest.mark.parametrize(
    ("context", "repeated"),
    # 3 and 1: the user follows the assistant, which could be another conversation, and is refused
    [(c, r) for c in range(5) for r in range(5) if c + r >= 4 and (c, r) != (3, 1)],
)
def test_what_stands_before_both_sides_is_there_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, key: str, context: int, repeated: int
) -> None:
    """Whatever share of the conversation stands before, and whatever share of it the sides repeat."""
    talk = [SYSTEM, *turns("1+1", "2", "again")]
    before, after = talk[:context], talk[4 - repeated :]
    row = {key: before or None, "chosen": [*after, *turns("", "2")[1:]], "rejected": [*after, *turns("", "3")[1:]]}
    (pair,), _ = load(tmp_path, tokenizer, row)
    said = f"<|im_start|>system\nBe brief.<|im_end|>\n{USER}1+1<|im_end|>\n{ASSISTANT}2<|im_end|>\n"
    said += f"{USER}again<|im_end|>\n{ASSISTANT}"
    assert shown(tokenizer, pair) == [f"{said}|2<|im_end|>", f"{said}|3<|im_end|>"]


@pytest.mark.parametrize("first", [[], [SYSTEM], turns("0+0", "0")], ids=["alone", "system", "longer"])
def test_one_whole_side_as_messages_is_no_context(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, first: list[dict[str, str]]
) -> None:
    """UltraFeedback: `messages` repeats `chosen`, and `prompt` the first question."""
    chosen, rejected = [*first, *turns("1+1", "2")], [*first, *turns("1+1", "3")]
    alone, _ = load(tmp_path, tokenizer, {"chosen": chosen, "rejected": rejected})
    for messages in (chosen, rejected):
        row = {"prompt": "1+1", "messages": messages, "chosen": chosen, "rejected": rejected}
        assert list(load(tmp_path, tokenizer, row)[0]) == list(alone)


def test_a_text_as_prompt_is_the_question_of_sides_without_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {"prompt": "1+1", "chosen": turns("", "2")[1:], "rejected": turns("", "3")[1:]}
    (pair,), _ = load(tmp_path, tokenizer, row)
    assert shown(tokenizer, pair)[0] == f"{USER}1+1<|im_end|>\n{ASSISTANT}|2<|im_end|>"


def test_text_stays_text_if_it_reads_as_json(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (pair,), _ = load(tmp_path, tokenizer, {"prompt": "[1, 2]", "chosen": "[3]", "rejected": '{"a": 4}'})
    assert shown(tokenizer, pair) == ["[1, 2]|[3]<|im_end|>", '[1, 2]|{"a": 4}<|im_end|>']


def test_turns_that_both_have_are_no_response(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (pair,), _ = load(
        tmp_path,
        tokenizer,
        {"chosen": turns("1+1", "2", "2+2", "4"), "rejected": turns("1+1", "2", "2+2", "5")},
    )
    before = f"{USER}1+1<|im_end|>\n{ASSISTANT}2<|im_end|>\n{USER}2+2<|im_end|>\n{ASSISTANT}"
    assert shown(tokenizer, pair) == [f"{before}|4<|im_end|>", f"{before}|5<|im_end|>"]
    # from where they part on, every turn is
    (pair,), _ = load(
        tmp_path,
        tokenizer,
        {"chosen": turns("1+1", "2", "so", "4"), "rejected": turns("1+1", "3", "so", "4")},
    )
    for ids, mask in pair:
        assert [tokenizer.decode(i) for i, trained in zip(ids, mask, strict=True) if trained].count("<|im_end|>") == 2


def test_a_long_pair_is_left_out_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    fits = {"prompt": "q", "chosen": "5" * 8, "rejected": "a"}
    row = {"prompt": "q", "chosen": "a", "rejected": "5" * 9}
    pairs, left_out = load(tmp_path, tokenizer, fits, row, fits, max_length=10)
    assert left_out == 1
    assert [len(pair[0][0]) for pair in pairs] == [10, 10]
    with pytest.raises(DataError, match=r"no pair within data.max_length=10; raise it"):
        load(tmp_path, tokenizer, row, max_length=10)


def test_as_sequences(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = ({"prompt": "1+1=", "chosen": "2", "rejected": "13"}, {"prompt": "q", "chosen": "a", "rejected": "b"})
    pairs, _ = load(tmp_path, tokenizer, *rows)
    lengths = [len(ids) for pair in pairs for ids, _ in pair]

    responses = Rows(pairs.ids, pairs.trains, per_row=2).draw([0, 1])
    assert responses.lengths_B.tolist() == [length - 1 for length in lengths]
    assert responses.labels_T[responses.action_T].tolist() == [
        i for pair in pairs for ids, mask in pair for i, trained in zip(ids, mask, strict=True) if trained
    ]

    scored = Rows(pairs.ids, pairs.trains, per_row=2, scored=True).draw([0, 1])
    assert scored.lengths_B.tolist() == lengths  # a reward model reads the last token too
    assert scored.action_T.nonzero()[:, 0].tolist() == (scored.cu_seqlens[1:] - 1).tolist()
    assert scored.token_ids_T.tolist() == [i for pair in pairs for ids, _ in pair for i in ids]
    for batch in (responses, scored):
        assert batch.group_B.tolist() == [0, 0, 1, 1]
        actions = batch.positions(batch.action_T)
        assert actions.reward_T[actions.cu_seqlens[1:] - 1].tolist() == [1, 0, 1, 0]
        assert actions.reward_T.sum() == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "no 'rejected'; its keys are prompt, chosen"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "'chosen' must be text or a list of messages, not 3"),
        ({"chosen": "a", "rejected": "b"}, "'chosen' is text and answers nothing: the row needs a 'prompt'"),
        ({"chosen": turns("q"), "rejected": turns("q", "b")}, "'messages' must end with the assistant"),
        (
            {"messages": turns("p", "a"), "chosen": turns("q", "a"), "rejected": turns("q", "b")},
            "'chosen' begins with the user and does not repeat 'messages' or 'prompt', which end with the assistant",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Any, message: str) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=f"a.jsonl, row 2: .*{message}"):
        load(tmp_path, tokenizer, good, row)


def test_odd_pairs_are_counted_and_one_is_shown(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    notes: list[str] = []
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"chosen": turns("p", "a"), "rejected": turns("q", "b")},
        {"chosen": turns("p", "a"), "rejected": turns("p", "b")},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    load_pairs(str(path), tokenizer, None, 100, notes)
    assert notes == [
        f"{path}: 1 pairs have the same response twice",
        f"{path}: 1 pairs answer different prompts",
        f"{path}, first pair, chosen: q[[a<|im_end|>]]",
        f"{path}, first pair, rejected: q[[b<|im_end|>]]",
    ]
