from __future__ import annotations

from pathlib import Path

import pytest

from RL2.io import checkpoint
from RL2.io.report import Report
from RL2.trainer.early_stopping import Scores


@pytest.mark.parametrize(
    ("scores", "is_best", "fell_twice"),
    [
        ([0.5], True, False),
        ([0.5, 0.5], False, False),
        ([0.5, 0.6], True, False),
        ([0.6, 0.5], False, False),
        ([0.6, 0.5, 0.4], False, True),
        ([0.6, 0.5, 0.5], False, False),
        ([0.5, 0.6, 0.5], False, False),
        ([0.7, 0.6, 0.5, 0.55], False, False),
        ([0.1, 0.7, 0.6, 0.5], False, True),
    ],
)
def test_best_and_falling(scores: list[float], is_best: bool, fell_twice: bool) -> None:
    found = Scores(scores[:-1])
    found.add(scores[-1])
    assert (found.newest_is_best, found.fell_twice) == (is_best, fell_twice)


def test_scores_come_back_from_the_metrics(tmp_path: Path) -> None:
    report = Report(tmp_path, is_first=True, num_steps=9)
    assert report.rows() == []
    for step, metrics in enumerate([{"test/score": 1 / 3}, {"train/score": 0.5}, {"test/score": 0.25}]):
        report.step(step, metrics)
    assert [row["test/score"] for row in report.rows() if "test/score" in row] == [1 / 3, 0.25]
    assert Report(tmp_path, is_first=False, num_steps=9).rows() == []


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for name in ("step_000002", "step_000010", "step_000100", "step_000020.superseded", "latest", "best"):
        (tmp_path / name).mkdir()
    checkpoint.prune(tmp_path, 2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step_000010", "step_000100", "step_000020.superseded", "latest", "best"}
    checkpoint.prune(tmp_path, 5)
    assert {path.name for path in tmp_path.iterdir()} == left
