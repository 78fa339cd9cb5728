"""Confidence intervals against published values and other formulas."""

from __future__ import annotations

import math
from random import Random

import pytest

from RL2.evaluation.intervals import accuracy, paired_difference, quantile, unpaired_difference


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_values(right: int, n: int, low: float, high: float) -> None:
    estimate = accuracy([1.0] * right + [0.0] * (n - right))
    assert estimate == pytest.approx((right / n, low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 512), (3, 10), (250, 512), (512, 512)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_bounds_are_where_the_score_test_just_rejects(right: int, n: int, confidence: float) -> None:
    estimate = accuracy([1.0] * right + [0.0] * (n - right), confidence)
    z2 = quantile(confidence) ** 2
    for bound in (estimate.low, estimate.high):
        assert (right / n - bound) ** 2 == pytest.approx(z2 * bound * (1 - bound) / n, abs=1e-12)
    assert 0 <= estimate.low <= right / n <= estimate.high <= 1


def test_paired_difference_is_walds_interval_for_pairs() -> None:
    # 40 solved by both, 30 only after, 10 only before, 20 by neither
    before, after = [1.0] * 40 + [0.0] * 30 + [1.0] * 10 + [0.0] * 20, [1.0] * 70 + [0.0] * 30
    n, gained, lost = 100, 30, 10
    variance = (gained + lost - (gained - lost) ** 2 / n) / (n - 1)
    half = 1.959964 * math.sqrt(variance / n)
    assert paired_difference(before, after) == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-6)


def test_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered = Random(0), 0
    for _ in range(1000):
        before = [float(rng.random() < 0.4) for _ in range(200)]
        after = [max(score, float(rng.random() < 0.25)) for score in before]  # solves 0.6 * 0.25 more
        estimate = paired_difference(before, after)
        covered += estimate.low <= 0.15 <= estimate.high
    assert 0.92 <= covered / 1000 <= 0.98


def test_unpaired_difference_is_welchs() -> None:
    # means 2 and 5, variances 1 and 4 of three values each: standard error sqrt(1/3 + 4/3)
    half = 1.959964 * math.sqrt(5 / 3)
    assert unpaired_difference([1, 2, 3], [3, 5, 7]) == pytest.approx((3, 3 - half, 3 + half), abs=1e-6)


def test_no_change_is_a_difference_of_nothing() -> None:
    assert paired_difference([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]) == (0.0, 0.0, 0.0)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        accuracy([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        accuracy([0.0, 2.0])
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([0.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="confidence"):
        accuracy([1.0], confidence=95)
