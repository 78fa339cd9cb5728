"""Rows of data files, from bytes to token ids: one line that names the file, or rows that can be trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from fuzzing import clear, inputs, mangled, shaken
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from RL2.data.chat import messages_of, render
from RL2.data.preference import load_pairs
from RL2.data.prompts import load_prompts
from RL2.data.sft import load_examples
from RL2.data.source import load_rows
from RL2.data.watchdog import Watchdog

CHAT = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7 \u00e9"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "3 + 4 =", "response": "7", "chosen": "7", "rejected": "8", "extra_info": {"answer": 7}},
    {"prompt": None, "messages": CHAT[:1], "response": "7", "chosen": CHAT[1:], "rejected": CHAT[1:]},
]
TABLE = pa.table({"prompt": ["3 + 4 =", None, "5"], "n": [1.5, None, 3.0], "extra_info": [[1], [], None]})


def parquet() -> bytes:
    pa.parquet.write_table(TABLE, file := io.BytesIO())
    return file.getvalue()


def arrow(make: Any) -> bytes:
    file = io.BytesIO()
    with make(file, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return file.getvalue()


FILES = {
    "jsonl": ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),),
    "json": (json.dumps(ROWS).encode(), json.dumps(ROWS, indent=1, ensure_ascii=False).encode()),
    "csv": (
        b'prompt,response,extra_info\n3 + 4 =,7,"{""answer"": 7}"\n"a\nb",8,\n',
        b'messages\r\n"[{""role"": ""user"", ""content"": ""hello""}]"\r\n',
    ),
    "parquet": (parquet(),),
    "arrow": (arrow(pa.ipc.new_stream), arrow(pa.ipc.new_file)),
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_text_files(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / f"data.{kind}"

    @inputs(0.06)
    @given(mangled(*FILES[kind]))
    def read(data: bytes) -> None:
        file.write_bytes(data)
        with clear():
            rows = load_rows(str(file))
            assert rows and all(isinstance(row, dict) for row in rows)
            prompts = load_prompts(str(file), tokenizer, None, max_length=500)
            assert len(prompts) == len(rows)
            for prompt in prompts:
                assert prompt.text.strip() and 0 < len(prompt.token_ids) <= 500
                assert tokenizer.decode(prompt.token_ids) == prompt.text
                assert isinstance(prompt.extra_info, dict)

    read()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_binary_files(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"data.{kind}"

    @inputs(0.02)
    @given(mangled(*FILES[kind]))
    def read(data: bytes) -> None:
        file.write_bytes(data)
        with clear():
            assert load_rows(str(file))

    read()


@pytest.mark.parametrize("what", ["prompts", "examples", "pairs"])
def test_rows_of_any_content(what: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Among them what the files above hardly ever hold: the right words around wrong values."""
    (file := tmp_path / "data.jsonl").write_text("{}\n" * 2)

    @inputs(0.04)
    @given(st.tuples(shaken(ROWS[0]), shaken(ROWS[1])))
    def read(rows: tuple[Any, Any]) -> None:
        given_rows = iter(rows)

        def example(_: dict[str, Any]) -> Any:
            return next(given_rows)

        with clear():
            if what == "prompts":
                load_prompts(str(file), tokenizer, example, max_length=500)
            elif what == "examples":
                for trajectory in load_examples(str(file), tokenizer, example, max_length=500)[0]:
                    (sequence,) = trajectory.sequences
                    assert 0 < len(sequence.token_ids) <= 500 and any(sequence.action_mask)
            else:
                for pair in load_pairs(str(file), tokenizer, example, max_length=500)[0]:
                    assert all(any(mask) and len(ids) == len(mask) <= 500 for ids, mask in pair)

    read()


PIECES = [
    *("{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['role'] }}", "{% if m %}", "{% endif %}"),
    *("{{ messages[0] }}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ messages|tojson }}", "{% set ns = namespace(n=0) %}"),
    *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os }}", "{{ 2 ** 70 }}"),
    *("{{ raise_exception('no') }}", "{% include 'x' %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    *("{{ messages.append(1) }}", "{{ [1] * 9 }}", "{{ ''|attr('format') }}", "{{ strftime_now('%Y') }}", "}}", "{%"),
    *("{% generation %}", "{% endgeneration %}", "{{ add_generation_prompt }}", "{{ range(10 ** 9)|list }}", "text"),
    *("{{ '%d' % messages }}", "{{ messages|sum }}", "{{ messages|sort }}", "{{ bos_token.x }}", "{{ lipsum(0) }}"),
    "{{ " + "(" * 300 + ")" * 300 + " }}",
    "{% for x in y %}" * 30 + "{% endfor %}" * 30,
]


def test_chat_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of any content: they come with the model."""
    own, watchdog = tokenizer.chat_template, Watchdog(10, "the process is killed")

    @inputs(0.04)
    @given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6), shaken(CHAT))
    def use(pieces: list[str], messages: Any) -> None:
        tokenizer.chat_template = "".join(pieces)
        with clear():
            text = render(tokenizer, messages_of({"messages": messages}), watchdog, add_generation_prompt=True)
            text.encode()
            assert "subclasses" not in text and "<module" not in text

    try:
        use()
    finally:
        tokenizer.chat_template = own


def test_inputs_are_the_same_each_time() -> None:
    """So that a failure can be looked at."""
    seen: list[list[bytes]] = []
    for _ in range(2):
        some: list[bytes] = []

        @inputs(0.002)
        @given(mangled(*FILES["jsonl"]))
        def note(data: bytes) -> None:
            some.append(data)  # noqa: B023 - called within this round

        note()
        seen.append(some)
    assert seen[0] == seen[1] and len(seen[0]) >= 2
    assert np.unique([len(data) for data in seen[0]]).size > 1
