"""Confidence intervals: how often they hold the truth, by enumeration of all outcomes, and how wide they are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from RL2.tools.eval.intervals import accuracy, first_to_last, over_problems, paired_difference

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"
SLOW = pytest.mark.slow
CHANCES = np.arange(10, 991) / 1000


def log_factorials(n: int) -> np.ndarray:
    return np.array([math.lgamma(i + 1) for i in range(n + 1)])


def coverage_of_shares(n: int) -> np.ndarray:
    """Exact, of n values of 0 and 1, at each of `CHANCES`."""
    estimates = [accuracy([1.0] * right + [0.0] * (n - right)) for right in range(n + 1)]
    low_X, high_X = (np.array([getattr(estimate, end) for estimate in estimates]) for end in ("low", "high"))
    log, x, p = log_factorials(n), np.arange(n + 1), CHANCES[:, None]
    chance = np.exp(log[n] - log[x] - log[n - x] + x * np.log(p) + (n - x) * np.log1p(-p))
    return (chance * ((low_X <= p) & (p <= high_X))).sum(1)


def coverage_of_levels(n: int, middle: float) -> np.ndarray:
    """Exact, of n values of 0, `middle` and 1, at many chances of the three."""
    counts = [(a, b, n - a - b) for a in range(n + 1) for b in range(n + 1 - a)]
    estimates = [over_problems([0.0] * a + [middle] * b + [1.0] * c) for a, b, c in counts]
    low_X, high_X = (np.array([getattr(estimate, end) for estimate in estimates]) for end in ("low", "high"))
    log, counts_XL = log_factorials(n), np.array(counts)
    log_ways_X = log[n] - log[counts_XL].sum(1)
    found = []
    for mean, part in product((0.01, 0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.98, 0.99), (0.01, 0.3, 0.7, 0.99)):
        between = part * min(mean / middle, (1 - mean) / (1 - middle))
        chance_L = np.array([1 - mean - between * (1 - middle), between, mean - between * middle])
        chance_X = np.exp(log_ways_X + counts_XL @ np.log(chance_L))
        found.append(chance_X[(low_X <= mean) & (mean <= high_X)].sum())
    return np.array(found)


def documented(heading: str) -> dict[str, list[float]]:
    """The rows of the table of docs/evaluation.md that begins with `heading`, in percent."""
    table = DOCS.read_text(encoding="utf-8").split(f"| {heading} |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name: [float(re.sub("[ %]", "", cell)) for cell in cells] for name, *cells in rows}


@pytest.mark.parametrize("n", [5, 6, 7, 10, 14, 20, 33, 50, 100, *(pytest.param(n, marks=SLOW) for n in (200, 500))])
def test_shares_are_covered_at_any_chance(n: int) -> None:
    covered = coverage_of_shares(n)
    assert covered.min() >= 0.95
    least, mean = 100 * covered.min(), 100 * covered.mean()
    print(f"| {n} | {least:.1f}% | {mean:.1f}% |")
    if n in (5, 10, 20, 50, 100, 200, 500):
        assert documented("problems, each 0 or 1")[str(n)] == pytest.approx([least, mean], abs=0.06)


@pytest.mark.parametrize("n", [5, 10, pytest.param(20, marks=SLOW)])
def test_values_of_several_levels_are_covered_too(n: int) -> None:
    """Means of two samples, partial credit for little, and little missing."""
    leasts = [100 * coverage_of_levels(n, middle).min() for middle in (0.5, 0.01, 0.9)]
    print(f"| {n} | " + " | ".join(f"{least:.1f}%" for least in leasts) + " |")
    assert min(leasts) >= 95
    assert documented("problems, each 0, m or 1")[str(n)] == pytest.approx(leasts, abs=0.3)


@SLOW
@pytest.mark.parametrize(("n", "a", "b"), [(100, 1.0, 1.0), (50, 8.0, 0.2), (200, 0.1, 4.0)])
def test_means_of_samples_are_covered(n: int, a: float, b: float) -> None:
    """Problems differ in how hard they are (beta), and eight samples of each are drawn."""
    rng = np.random.default_rng(7)
    estimates = [over_problems(rng.binomial(8, rng.beta(a, b, n)) / 8) for _ in range(400)]
    covered = sum(estimate.low <= a / (a + b) <= estimate.high for estimate in estimates)
    assert covered >= 0.93 * 400
    if a == b:
        assert covered <= 0.98 * 400


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998)
    [(81, 263, 0.2527, 0.3676), (15, 148, 0.0578, 0.1617), (0, 20, 0.0, 0.1684), (1, 29, 0.0009, 0.1776)],
)
def test_shares_have_the_published_values(right: int, n: int, low: float, high: float) -> None:
    estimate = accuracy([1.0] * right + [0.0] * (n - right))
    assert estimate == pytest.approx((right / n, low, high), abs=5e-5)


def test_both_forms_are_the_same_interval() -> None:
    """A value a hair from the bounds takes the random weights instead of the binomial distribution."""
    for right, n in [(0, 5), (4, 5), (10, 20), (59, 60)]:
        scores = [1.0] * right + [0.0] * (n - right)
        assert over_problems([*scores[:-1], 1e-9]) == pytest.approx(over_problems(scores), abs=0.01)


@pytest.mark.parametrize("sd", [0.2, 0.4])
def test_many_values_have_no_wider_interval_than_the_normal_one(sd: float) -> None:
    values = np.clip(np.random.default_rng(0).normal(0.5, sd, 400), 0, 1)
    estimate = over_problems(values)
    assert (estimate.high - estimate.low) / (2 * 1.96 * values.std(ddof=1) / 20) == pytest.approx(1.05, abs=0.05)


def test_scores_may_lie_anywhere() -> None:
    """An interval grows with the scale of the scores."""
    scores = np.random.default_rng(0).choice([0.0, 1.0, 0.25], 30)
    share = over_problems(scores)
    for scale in (10.0, 1000.0):
        assert over_problems(scores * scale) == pytest.approx([scale * x for x in share])
    signed = over_problems([-1.0] * 20, bounds=(-1.0, 1.0))
    assert signed == pytest.approx((-1.0, -1.0, -1 + 2 * 0.1684), abs=1e-4)


@pytest.mark.parametrize(("gained", "lost", "n"), [(5, 0, 200), (6, 0, 200), (9, 1, 100), (11, 3, 50), (20, 5, 60)])
def test_a_difference_is_one_where_mcnemars_exact_test_rejects(gained: int, lost: int, n: int) -> None:
    after = [1.0] * gained + [0.0] * lost + [0.5] * (n - gained - lost)
    before = [0.0] * gained + [1.0] * lost + [0.5] * (n - gained - lost)
    p = 2 * sum(math.comb(gained + lost, k) for k in range(gained, gained + lost + 1)) / 2 ** (gained + lost)
    estimate = paired_difference(before, after)
    assert (estimate.low > 0) == (p < 0.05)
    assert estimate.value == pytest.approx((gained - lost) / n)


def test_no_change_is_known_as_well_as_the_problems_allow() -> None:
    estimate = paired_difference([0.0, 1.0] * 30, [0.0, 1.0] * 30)
    assert estimate.value == 0
    assert estimate.low == pytest.approx(-0.06, abs=0.005)  # 3.7 / 60, as for a share of which none was seen
    assert estimate.high == pytest.approx(0.06, abs=0.005)


@pytest.mark.parametrize(("r", "most"), [(0.0, 0.05), (0.6, 0.06), (0.9, 0.06)])
def test_steps_that_resemble_their_neighbours_are_no_change(r: float, most: float) -> None:
    rng, moved = np.random.default_rng(0), 0
    for _ in range(150):
        series = rng.normal(size=160)
        for step in range(1, len(series)):
            series[step] += r * series[step - 1]
        estimate = first_to_last(series[-60:].tolist(), 10)
        moved += not estimate.low <= 0 <= estimate.high
    assert moved <= most * 150


@pytest.mark.parametrize("noise", [0.001, 0.02])
@pytest.mark.parametrize("fallen", [lambda t: np.exp(-t / 15), lambda t: 1.0 * (t < 30)], ids=["slowly", "at once"])
def test_a_fall_is_one(fallen: Callable[[np.ndarray], np.ndarray], noise: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        series = 0.3 + 0.5 * fallen(np.arange(60)) + rng.normal(0, noise, 60)
        estimate = first_to_last(series.tolist(), 10)
        assert -0.8 < estimate.low < estimate.high < 0


def test_a_series_without_noise_has_no_width() -> None:
    straight = first_to_last(np.arange(20.0).tolist(), 10)
    assert straight == pytest.approx((10.0, 10.0, 10.0))
    assert first_to_last([0.5] * 8, 4) == (0.0, 0.0, 0.0)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        accuracy([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        accuracy([0.0, 2.0])
    with pytest.raises(ValueError, match="same problems"):
        paired_difference([0.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="confidence"):
        accuracy([1.0], confidence=95)
    with pytest.raises(ValueError, match="no two ends of 5"):
        first_to_last([1.0] * 9, 5)
