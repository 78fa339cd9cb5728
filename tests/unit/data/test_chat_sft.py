from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.data import sft
from RL2.data.sft import load_examples
from RL2.data.source import DataError
from RL2.types import Trajectory

MARKED = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}BODY{% endgeneration %}REST
{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


def called(name: str, arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def load(
    folder: Path, tokenizer: PreTrainedTokenizerBase, *rows: Any, max_length: int = 200
) -> tuple[list[Trajectory], int]:
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_examples(str(path), tokenizer, None, max_length)


def show(tokenizer: PreTrainedTokenizerBase, trajectory: Trajectory) -> str:
    """The text, with [brackets] around what is trained on."""
    (sequence,) = trajectory.sequences
    text, before = "", False
    for token, trained in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True):
        text += "[" * (trained > before) + "]" * (before > trained) + str(tokenizer.decode([token]))
        before = trained
    return text + "]" * before


def test_the_rows_formats(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trajectories, num_left_out = load(
        tmp_path,
        tokenizer,
        {"prompt": "12+30=", "response": "42"},
        {"messages": turns("12+30", "42"), "prompt": None},
        {"messages": turns("12+30", "42", "48-19"), "response": "29"},
        {"messages": json.dumps(turns(" apples ", " \n4 "))},
    )
    assert [show(tokenizer, trajectory) for trajectory in trajectories] == [
        "12+30=[42<|im_end|>]",
        "<|im_start|>user\n12+30<|im_end|>\n<|im_start|>assistant\n[42<|im_end|>]",
        "<|im_start|>user\n12+30<|im_end|>\n<|im_start|>assistant\n[42<|im_end|>]\n"
        "<|im_start|>user\n48-19<|im_end|>\n<|im_start|>assistant\n[29<|im_end|>]",
        "<|im_start|>user\n apples <|im_end|>\n<|im_start|>assistant\n[ \n4 <|im_end|>]",
    ]
    assert num_left_out == 0
    first = trajectories[2]
    assert (first.row, first.group, first.sample) == (2, 2, 0)
    (sequence,) = first.sequences
    assert sequence.logps.tolist() == sequence.rewards.tolist() == [0.0] * len(sequence.token_ids)


def test_token_ids_are_those_of_the_whole_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = turns("How many — 🍎?", "Four 🍎🍎!", "Sure?", "Yes. 四")
    trajectories, _ = load(tmp_path, tokenizer, {"messages": messages})
    text = str(tokenizer.apply_chat_template(messages, tokenize=False)).removesuffix("\n")
    (sequence,) = trajectories[0].sequences
    assert sequence.token_ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
    trained = [token for token, m in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True) if m]
    assert tokenizer.decode(trained) == "Four 🍎🍎!<|im_end|>Yes. 四<|im_end|>"


def test_encoding_apart_agrees(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: Any) -> None:
    rows = [{"messages": turns("12+30", "42", "48-19", "29")}, {"messages": turns("Tom has 12 apples", "#### 12")}]
    whole, _ = load(tmp_path, tokenizer, *rows)
    monkeypatch.setattr(sft, "_encode_whole", sft._encode_apart)
    assert list(load(tmp_path, tokenizer, *rows)[0]) == list(whole)


@pytest.mark.parametrize(
    ("body", "rest"),
    [
        ("{{ message.content }}<|im_end|>", ""),
        ("{{ message.content }}<|im_end|>\n", ""),
        ("{{ message.content }}", "<|im_end|>"),
    ],
)
def test_generation_marks(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, body: str, rest: str) -> None:
    marked = copy.deepcopy(tokenizer)
    marked.chat_template = MARKED.replace("BODY", body).replace("REST", rest)
    trajectories, _ = load(tmp_path, marked, {"messages": turns("12+30", "42", "48-19", "29")})
    text = show(marked, trajectories[0])
    assert text.count("[") == 2
    assert "assistant\n[42<|im_end|>]" in text
    assert "assistant\n[29<|im_end|>]" in text


def test_what_a_template_rewrites_later_does_not_train(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A turn stands in the conversation as it stood when it was said, or it is no example of saying it."""
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = str(tokenizer.chat_template).replace(
        "{{ message.content }}", "{{ message.content if loop.last else message.content.split('</think>')[-1] }}"
    )
    plain, thought = turns("12+30", "42", "48-19", "29"), turns("12+30", "<think>hm</think>42", "48-19", "29")
    notes: list[str] = []
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in (plain, thought, thought[:2])))
    trajectories, _ = load_examples(str(path), forgetful, None, 200, notes=notes)
    assert [re.findall(r"\[.*?\]", show(forgetful, trajectory)) for trajectory in trajectories] == [
        ["[42<|im_end|>]", "[29<|im_end|>]"],
        ["[29<|im_end|>]"],
        ["[<think>hm</think>42<|im_end|>]"],
    ]
    assert [note.partition("a.jsonl: ")[2][:50] for note in notes[:-1]] == [
        "1 earlier turns of the assistant do not train: the"
    ]


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize(
    ("train_on", "weights", "trained"),
    [
        ("all", (0, 1, 0), ["a", "b", "c"]),
        ("last", (0, 1, 0), ["c"]),
        ("weighted", (0, 1, 0), ["b"]),
        ("weighted", (None, 0, 1.0), ["a", "c"]),
        ("weighted", (False, True, None), ["b", "c"]),
    ],
)
def test_turns_that_are_chosen(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    marks: bool,
    train_on: Any,
    weights: tuple[Any, ...],
    trained: list[str],
) -> None:
    """OpenAI's rows give the turns that are not to be learned weight 0."""
    other = copy.deepcopy(tokenizer)
    if marks:
        other.chat_template = MARKED.replace("BODY", "{{ message.content }}<|im_end|>").replace("REST", "")
    messages: list[dict[str, Any]] = turns("1", "a", "2", "b", "3", "c")
    for message, weight in zip(messages[1::2], weights, strict=True):
        message["weight"] = weight
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    ((trajectory,), _) = load_examples(str(path), other, None, 200, train_on)
    assert re.findall(r"\[(.)<\|im_end\|>\]", show(other, trajectory)) == trained


def test_text_after_the_turn_is_kept_out_only_by_an_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }};\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    trajectories, _ = load(tmp_path, plain, {"messages": turns("12", "42")})
    (sequence,) = trajectories[0].sequences
    trained = [token for token, m in zip(sequence.token_ids.tolist(), sequence.action_mask.tolist(), strict=True) if m]
    assert str(plain.decode(trained)).strip() == "42;"


def test_long_rows_are_left_out_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"prompt": "1", "response": "2" * n} for n in (3, 8, 9)] + [{"prompt": "1" * 20, "response": "2"}]
    trajectories, num_left_out = load(tmp_path, tokenizer, *rows, max_length=10)
    assert [(each.row, len(each.sequences[0].token_ids)) for each in trajectories] == [(0, 5), (1, 10)]
    assert num_left_out == 2
    with pytest.raises(DataError, match=r"a.jsonl: no example within data.max_length=4; raise it"):
        load(tmp_path, tokenizer, *rows, max_length=4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q"}, "'prompt' without 'response'; its keys are prompt"),
        ({"prompt": "q", "response": 3}, "'response' must be text, not 3"),
        ({"question": "q"}, "keys are question; .* in SFT data.env_path"),
        ({"messages": turns("q")}, "must end with the assistant, or the row needs a 'response'"),
        ({"messages": turns("q", "a"), "response": "b"}, "both 'response' and a final assistant turn"),
        ({"messages": turns("q", "a")[1:]}, "nothing to answer"),
        ({"messages": [*turns("q"), {"role": "assistant", "content": "a", "weight": 0.5}]}, "it must be 0 or 1"),
        ({"messages": [*turns("q"), {"role": "assistant", "content": "a", "weight": 0}]}, "every turn .* has weight 0"),
        ({"messages": turns("q", "a"), "tools": "[3"}, "'tools' must be a list of objects, not"),
        ({"messages": turns("q", "a"), "tools": [{"function": {"name": "f"}}]}, "leaves out the tool 'f'"),
        ({"messages": turns("q", "a"), "chat_template_kwargs": 3}, "'chat_template_kwargs' must be an object, not 3"),
        ({"messages": [*turns("q"), called("f", {})]}, "leaves out a call of the assistant: 'f'"),
        (
            {"messages": [*turns("q"), called("f", "{")]},
            "must have a 'function' with 'name' and an object as 'arguments'",
        ),
        (
            {"messages": [*turns("q"), {"role": "assistant", "content": [{"type": "image"}]}]},
            "has a part without text",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl, row 2: .*{message}"):
        load(tmp_path, tokenizer, {"prompt": "q", "response": "a"}, row, max_length=50)


def test_a_raw_response_needs_an_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = endless.chat_template = None
    with pytest.raises(DataError, match="eos token"):
        load(tmp_path, endless, {"prompt": "q", "response": "a"})


def test_a_row_is_shown_with_what_trains(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The first one that trains, in a line, and how many rows train nothing but the end of a turn."""
    notes: list[str] = []
    path = tmp_path / "a.jsonl"
    long = {"prompt": "q" * 300, "response": "a"}
    rows = [
        long,
        {"messages": turns("1", "2", "3", "4")},
        {"messages": turns("1", "")},
        {"prompt": "q", "response": " "},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    load_examples(str(path), tokenizer, None, 100, notes=notes)
    header = "<|im_start|>assistant\\n"
    assert notes == [
        f"{path}: 2 rows train an empty turn of the assistant, which is only its end token",
        f"{path}, row 2: <|im_start|>user\\n1<|im_end|>\\n{header}[[2<|im_end|>]]\\n"
        f"<|im_start|>user\\n3<|im_end|>\\n{header}[[4<|im_end|>]]",
    ]
    notes.clear()
    path.write_text(json.dumps({"prompt": "q" * 2000, "response": "a"}))
    load_examples(str(path), tokenizer, None, 3000, notes=notes)
    assert notes[0].endswith("qqq[[a<|im_end|>]]") and len(notes[0]) < 800
