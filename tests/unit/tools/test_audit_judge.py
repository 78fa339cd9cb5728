"""Intervals of a judge's agreement and position bias, over simulated judges whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from RL2.tools.audit_judge import agreement, difference, flips, position_bias, preference

JUDGES = 120


def marks_of(rng: np.random.Generator, items: int, repeats: int, noise: float) -> Any:
    """Return marks [items, repeats]: each item has one of its own between 1 and 5, and one in `noise` is another."""
    own = rng.integers(1, 6, items)[:, None].repeat(repeats, 1)
    other = rng.integers(1, 6, (items, repeats))
    return np.where(rng.random((items, repeats)) < noise, other, own).tolist()


@pytest.mark.parametrize(("items", "repeats", "noise"), [(12, 2, 0.1), (40, 3, 0.3), (40, 2, 0.8), (100, 5, 0.02)])
def test_the_interval_of_agreement_covers_the_truth(items: int, repeats: int, noise: float) -> None:
    """At its nominal rate or above: it is exact for two repeats, and for more may be wider than it need be."""
    rng = np.random.default_rng(3)
    # equal if neither is another, or by chance, one in five
    stay = (1 - noise) ** 2
    truth = stay + (1 - stay) / 5
    found = [agreement(marks_of(rng, items, repeats, noise)) for _ in range(JUDGES)]
    covered = np.mean([estimate.low <= truth <= estimate.high for estimate in found])
    assert covered >= 0.95 - 2 * (0.95 * 0.05 / JUDGES) ** 0.5
    assert abs(np.mean([estimate.value for estimate in found]) - truth) < 1.75 * (items * JUDGES) ** -0.5  # 3.5 sigma
    assert np.mean([estimate.high - estimate.low for estimate in found]) < 2.5 * items**-0.5


def test_the_interval_of_the_distance_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    shares = [[[(mark - 1) / 4 for mark in row] for row in marks_of(rng, 40, 2, 0.5)] for _ in range(JUDGES)]
    truth = 0.75 * 0.4  # two marks at random are 1.6 of 4 apart, and one in four has neither at random
    covered = np.mean([(e := difference(one)).low <= truth <= e.high for one in shares])
    assert covered >= 0.95 - 2 * (0.95 * 0.05 / JUDGES) ** 0.5


def verdicts(rng: np.random.Generator, pairs: int, better: float, first: float) -> list[tuple[str, str]]:
    """Return verdicts on both orders of pairs whose better response has the chance `better`, the first place `first`.

    `first` is added to the chance of whichever response comes first.
    """
    one = rng.random(pairs) < better + first
    two = rng.random(pairs) < 1 - better + first
    return [("A" if a else "B", "A" if b else "B") for a, b in zip(one, two, strict=True)]


@pytest.mark.parametrize("better", [0.5, 0.8])
def test_position_bias_is_found_where_it_is_and_not_where_it_is_not(better: float) -> None:
    rng = np.random.default_rng(5)

    def share_found(first: float) -> float:
        found = [position_bias(verdicts(rng, 60, better, first)) for _ in range(JUDGES)]
        assert abs(np.mean([estimate.value for estimate in found]) - 2 * first) < 0.03
        return float(np.mean([not estimate.low <= 0 <= estimate.high for estimate in found]))

    assert share_found(0.0) <= 0.05 + 2 * (0.95 * 0.05 / JUDGES) ** 0.5
    assert share_found(0.2) >= 0.9
    assert share_found(-0.2) >= 0.9


def test_what_verdicts_on_both_orders_say() -> None:
    always_first, steady, ties = [("A", "A")] * 4, [("A", "B")] * 4, [("tie", "tie")] * 4
    assert [flips(v).value for v in (always_first, steady, ties)] == [1.0, 0.0, 0.0]
    assert [position_bias(v).value for v in (always_first, steady, ties)] == [1.0, 0.0, 0.0]
    assert [preference(v).value for v in (always_first, steady, ties)] == [0.5, 1.0, 0.5]
    assert flips([("A", "tie")]).value == 1.0
    assert position_bias([("B", "B")]).value == -1.0
