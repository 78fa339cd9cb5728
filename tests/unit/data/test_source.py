from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from RL2.data.bad_rows import load_converted
from RL2.data.source import DataError, describe, is_here, load_rows, with_columns

ROWS = [{"prompt": "1+1=", "extra_info": {"answer": "2"}}, {"prompt": "2+2=\u2028?", "extra_info": {"answer": "4"}}]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_json_and_jsonl(tmp_path: Path) -> None:
    assert load_rows(write(tmp_path / "a.json", json.dumps(ROWS, indent=1, ensure_ascii=False))) == ROWS
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert load_rows(write(tmp_path / "a.jsonl", "\ufeff" + lines)) == ROWS


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'prompt,extra_info\r\n"two\nlines, ""quoted""","{""answer"": 2}"\r\n\r\nb,\r\n')
    assert load_rows(path) == [
        {"prompt": 'two\nlines, "quoted"', "extra_info": '{"answer": 2}'},
        {"prompt": "b", "extra_info": ""},
    ]


def test_parquet_and_both_kinds_of_arrow(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        assert load_rows(str(tmp_path / name)) == ROWS


def test_keys_that_arrow_fills_in_are_no_arguments(tmp_path: Path) -> None:
    """Of tools and calls at any depth; a null elsewhere is somebody's data."""

    def row(arguments: dict[str, Any], properties: dict[str, Any]) -> dict[str, Any]:
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        tools = [{"function": {"name": "f", "parameters": {"properties": properties}}}]
        return {"messages": [{"role": "assistant", "tool_calls": calls}], "tools": tools, "extra_info": {"a": None}}

    rows = [row({"x": 1}, {"x": {"type": "t"}}), row({"y": {"z": [{"v": "w"}, {"u": 2}]}}, {"y": {"enum": ["a"]}})]
    table = pa.Table.from_pylist(rows)
    assert "None" in str(table.to_pylist()[0]["messages"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "a.arrow", "saved"):
        assert load_rows(str(tmp_path / name)) == rows
    given = write(tmp_path / "a.jsonl", json.dumps(row({"x": None}, {})))
    assert load_rows(given) == [row({"x": None}, {})], "JSON fills in nothing: it is meant"


def test_folders_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "splits")
    assert load_rows(str(tmp_path / "one")) == ROWS
    assert load_rows(f"test@{tmp_path / 'splits'}") == ROWS[1:]
    assert load_rows(str(tmp_path / "splits")) == ROWS
    with pytest.raises(DataError, match=r"it has no split 'dev'; write train@.*, test@"):
        load_rows(f"dev@{tmp_path / 'splits'}")
    with pytest.raises(DataError, match="without splits"):
        load_rows(f"train@{tmp_path / 'one'}")


def test_hub_name_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        if name == "no/such":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("train@openai/gsm8k:main") == ROWS
    assert load_rows("test[:2]@some/set") == ROWS
    assert load_rows("Chenmien/UltraFeedback") == load_rows("squad") == load_rows("openai/gsm8k:main") == ROWS
    assert asked == [
        ("openai/gsm8k", "main", "train"),
        ("some/set", None, "test[:2]"),
        ("Chenmien/UltraFeedback", None, "train"),
        ("squad", None, "train"),
        ("openai/gsm8k", "main", "train"),
    ]
    with pytest.raises(DataError, match="train@no/such: ConnectionError: no network"):
        load_rows("train@no/such")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "no rows"),
        ("a.json", " ", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "prompt,answer\n", "no rows"),
        ("a.jsonl", '{"a": 1}\n\n{"a": }\n', r"row 2 \(line 3\): Expecting value \(column 7\)"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"row 2 \(line 2\): expected an object, found \[1\]"),
        ("a.json", '[{"a": 1},\n {"a": 2},\n {"a" 3}]', r"row 3 \(line 3\): Expecting ':'"),
        ("a.json", '[{"a": 1},\n "b"]', r'row 2 \(line 2\): expected an object, found "b"'),
        ("a.json", '[{"a": 1},\n {"a": 2}', r"row 3 \(line 2\): expected ','"),
        ("a.json", '[{"a": 1},]', r"row 2 \(line 1\): Expecting value"),
        ("a.json", '[{"a": 1}\n {"a": 2}]', r"row 2 \(line 2\): expected ','"),
        ("a.json", '[{"a": 1}] x', "more text after the end"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"not an array of objects; .* \.jsonl"),
        ("a.csv", "a,b\n1,2\n1\n", r"row 2 \(line 3\): 1 fields, the header has 2"),
        ("a.csv", 'a,b\n1,"2\n', r"row 1 \(line 2\): unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", "the same name"),
        ("a.parquet", "nonsense", "a.parquet: "),
        ("a.arrow", "nonsense", "a.arrow: "),
        ("a.txt", "x", r"unknown suffix '.txt'; known are .json, .jsonl"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=message) as error:
        load_rows(path)
    assert path in str(error.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.jsonl").write_bytes(b'{"a": "\xff"}')
    for path, message in [
        (str(tmp_path / "b.jsonl"), "there is no such file"),
        (str(tmp_path / "nothing"), "there is no such file, and it is not a valid name of a hub data set"),
        ("data/of/mine", "there is no such file"),
        (str(tmp_path / "folder"), "folder: "),
        ("@openai/gsm8k", "write split@name"),
        (str(tmp_path / "bytes.jsonl"), "not UTF-8 at byte 7"),
    ]:
        with pytest.raises(DataError, match=message):
            load_rows(path)


def test_describe_reads_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{" * 4200)
    assert describe(path) == f"{path}: jsonl file, 4.2 KB"
    name = "train@openai/gsm8k:main"
    assert describe(name) == f"{name}: hub data set openai/gsm8k, subset main, split train"
    assert describe(f"train@{tmp_path}").endswith(f"folder {tmp_path}, split train")
    assert describe("openai/gsm8k") == "openai/gsm8k: hub data set openai/gsm8k, split train"
    assert not is_here("openai/gsm8k")
    assert is_here(str(tmp_path))
    with pytest.raises(DataError, match="no such file"):
        describe(str(tmp_path / "b.csv"))


def test_example_names_the_row_that_it_fails_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "q"}\n{"ask": "q"}')
    with pytest.raises(DataError, match=r"row 2: example\(row\) failed with KeyError: 'question'; .* keys are ask"):
        load_converted(path, lambda row: {"prompt": row["question"]})
    with pytest.raises(DataError, match=r"row 1: example\(row\) returned 'q', neither a dict nor None"):
        load_converted(path, lambda row: row["question"])


def test_columns_that_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "1+1", "prompt": "other", "messages": [], "n": 1}\n{"q": null, "n": 2}')
    question = {"prompt": "q"}
    assert load_converted(path, with_columns({}, None)) == load_rows(path)
    assert load_converted(path, with_columns(question, None)) == [
        {"messages": [], "n": 1, "prompt": "1+1"},
        {"n": 2, "prompt": None},
    ]
    assert load_converted(path, with_columns(question | {"messages": None}, None)) == [
        {"n": 1, "prompt": "1+1"},
        {"n": 2, "prompt": None},
    ]


def test_columns_are_renamed_before_a_script_and_left_out_after_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": "1+1"}')

    def example(row: dict[str, str]) -> dict[str, str]:
        return row | {"messages": row["prompt"] + "?"}

    assert load_converted(path, with_columns({"prompt": "q"}, example)) == [{"prompt": "1+1", "messages": "1+1?"}]
    assert load_converted(path, with_columns({"prompt": "q", "messages": None}, example)) == [{"prompt": "1+1"}]
    with pytest.raises(DataError, match=r"a.jsonl, row 1: no column 'question'; its columns are q$"):
        load_converted(path, with_columns({"prompt": "question"}, example))
