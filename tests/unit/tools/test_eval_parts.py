"""`rl2 eval` of a reward in parts: weights as in training, and a line for each part and metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from RL2.errors import ConfigError
from RL2.tools.eval.evaluate import RECORDS, EvalConfig, _record, read, summarise, table
from RL2.tools.settings import parse_settings
from RL2.types import Sequence, Trajectory

GIVEN = ("model=m", "data=d", "env=e")


def record(row: int, sample: int, parts: dict[str, float], metrics: dict[str, float], **changes: Any) -> dict[str, Any]:
    weighted = sum(parts.values())
    sequence = Sequence([1, 2], [False, True], [0.0, 0.0], [0.0, weighted])
    found = Trajectory(row, row, sample, [sequence], ["q", "a"], parts=parts, weighted=weighted, metrics=metrics)
    for name, value in changes.items():
        setattr(found, name, value)
    return _record(found, sample, None)


def test_parts_are_summed_up_by_problem() -> None:
    """Of the samples where there are some; a part counts where a response has it."""
    records = [
        record(0, -1, {"correct": 0.0}, {}),
        record(0, 0, {"correct": 1.0, "format": 0.5, "length": -3.0}, {"calls": 2.0}),
        record(0, 1, {"correct": 0.0}, {"calls": 4.0}),
        record(1, 0, {"correct": 1.0}, {}),
        record(1, 1, {}, {"calls": 7.0}, unscored="broken"),
    ]
    summary = summarise(
        parse_settings(EvalConfig, [*GIVEN, "samples=2", "weights.format=0.5", "weights.corect=2"]), records
    )
    assert summary["reward/correct"]["value"] == 0.75
    assert summary["reward/format"]["value"] == 0.5
    assert summary["reward/length"] == -3, "a number alone: its bounds are not known"
    assert summary["env/calls"] == 5
    shown = table(summary)
    assert shown.caption == "weights.corect match no part of any reward"
    assert {"reward/correct", "reward/length", "env/calls"} <= {*shown.columns[0].cells}
    greedy = summarise(parse_settings(EvalConfig, GIVEN), records[:1])
    assert greedy["reward/correct"]["value"] == 0


def test_records_of_older_versions_have_no_parts(tmp_path: Path) -> None:
    new = record(0, 0, {"correct": 1.0}, {"calls": 2.0})
    old = {name: value for name, value in new.items() if name not in ("parts", "metrics")}
    (tmp_path / RECORDS).write_text(f"{json.dumps(new)}\n{json.dumps(old)}\n")
    assert read(tmp_path) == [new, old]
    for name in ("parts", "metrics"):
        for broken in (3, {"a": "b"}, {"a": None}):
            (tmp_path / RECORDS).write_text(json.dumps(new | {name: broken}) + "\n")
            with pytest.raises(ConfigError, match=f"line 1: .*it has no {name} as `rl2 eval` writes them"):
                read(tmp_path)


def test_weights_are_checked() -> None:
    assert parse_settings(EvalConfig, [*GIVEN, "weights.a=0.5"]).weights == {"a": 0.5}
    with pytest.raises(ConfigError, match=r"weights\.a='x'; expected a number"):
        parse_settings(EvalConfig, [*GIVEN, "weights.a=x"])
    with pytest.raises(ConfigError, match="env= is missing"):
        parse_settings(EvalConfig, GIVEN[:2])
