"""Files of JSON lines that another process writes, or wrote until it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from RL2.errors import UserError
from RL2.io.jsonl import JsonlTail, read_lines, read_records, remove_incomplete_line, truncate_before


def test_an_incomplete_last_line_is_left_out_and_removed(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert list(read_lines(file)) == []
    remove_incomplete_line(file)
    assert not file.exists()
    file.write_bytes(b'{"step": 0}\n{"step": 1}\n{"step": 2')
    assert list(read_lines(file)) == [(b'{"step": 0}\n', 12), (b'{"step": 1}\n', 24)]
    assert list(read_lines(file, 12)) == [(b'{"step": 1}\n', 24)]
    assert [row["step"] for row in read_records(file)] == [0, 1]
    remove_incomplete_line(file)
    assert file.read_bytes() == b'{"step": 0}\n{"step": 1}\n'
    truncate_before(file, 1)
    assert file.read_bytes() == b'{"step": 0}\n'


def test_a_tail_yields_each_record_once(tmp_path: Path) -> None:
    tail = JsonlTail(tmp_path / "metrics.jsonl")
    assert list(tail.new()) == []
    with tail.file.open("ab", buffering=0) as file:
        file.write(b'{"step": 0}\n{"step"')
        assert list(tail.new()) == [{"step": 0}]
        file.write(b": 1}\n")
        assert list(tail.new()) == [{"step": 1}]
    assert not tail.is_another
    tail.file.write_bytes(b"")
    assert tail.is_another


@pytest.mark.parametrize(("line", "why"), [(b"[", "not JSON"), (b"{}", "no step"), (b'{"step": "1"}', "no step")])
def test_a_record_without_a_step_is_refused_with_its_line(line: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line 2 .*{why}"):
        list(read_records(tmp_path / "metrics.jsonl"))
