"""Rows drawn by their past success."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from RL2.data.curriculum import FLOOR, Curriculum
from RL2.data.cursor import Cursor
from RL2.rollout.filters import success_rates
from RL2.types import Sequence, Trajectory

SOLVED = {0: 1.0, 1: 0.75, 2: 0.5, 3: 0.25, 4: 0.0}


def seen(rule: str) -> Curriculum:
    """Five rows, each of which went as `SOLVED` says."""
    curriculum = Curriculum(5, 1, seed=0, rule=rule)  # type: ignore[arg-type]
    for _ in range(5):
        curriculum.next()
    curriculum.learn(SOLVED)
    return curriculum


def test_the_first_pass_is_that_of_the_cursor() -> None:
    curriculum, cursor = Curriculum(10, 4, seed=3, rule="failures"), Cursor(10, 4, seed=3)
    first = [*curriculum.next(), *curriculum.next(), *curriculum.next(2)]
    assert first == [*cursor.next(), *cursor.next(), *cursor.next(2)]
    assert sorted(first) == list(range(10))


@pytest.mark.parametrize(
    ("rule", "weight"), [("failures", lambda s: 1 - s + FLOOR), ("frontier", lambda s: 4 * s * (1 - s) + FLOOR)]
)
def test_rows_come_as_often_as_their_weights_say(rule: str, weight: object) -> None:
    curriculum, number = seen(rule), 20_000
    drawn = Counter(row for _ in range(number) for row in curriculum.next())
    weights = {row: weight(s) for row, s in SOLVED.items()}  # type: ignore[operator]
    for row, w in weights.items():
        assert drawn[row] / number == pytest.approx(w / sum(weights.values()), abs=0.015)


def test_a_batch_has_no_row_twice() -> None:
    curriculum = seen("failures")
    for _ in range(50):
        assert len(set(curriculum.next(4))) == 4
    assert sorted(curriculum.next(10)) == sorted([*range(5)] * 2)


def test_the_newest_group_counts_most() -> None:
    curriculum = Curriculum(2, 1, seed=0, rule="failures")
    curriculum.learn({0: 0.0})
    curriculum.learn({0: 1.0})
    assert curriculum.rates == {0: 0.5}
    curriculum.learn({0: 1.0, 1: 1.0})
    assert curriculum.rates == {0: 0.75, 1: 1.0}
    assert curriculum.metrics() == {"curriculum/known": 1.0, "curriculum/success": 0.875, "curriculum/solved": 0.5}


def test_resume_is_exact() -> None:
    curriculum = seen("frontier")
    for _ in range(6):
        state = json.loads(json.dumps(curriculum.state_dict()))
        again = Curriculum(5, 1, seed=0, rule="frontier")
        again.load_state_dict(state)
        batch = curriculum.next(2)
        assert again.next(2) == batch
        curriculum.learn(dict.fromkeys(batch, 0.5))


def test_unscored_samples_are_no_failures() -> None:
    def trajectory(row: int, reward: float, unscored: str | None = None) -> Trajectory:
        return Trajectory(
            row=row,
            group=row,
            sample=0,
            sequences=[Sequence([1, 2], [False, True], [0.0, 0.0], [0.0, reward])],
            unscored=unscored,
        )

    sampled = [trajectory(0, 1), trajectory(0, 0), trajectory(0, 0, "late"), trajectory(1, 0), trajectory(2, 0, "late")]
    assert success_rates(sampled) == {0: 0.5, 1: 0.0}
