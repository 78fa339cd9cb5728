"""Intervals that hold at every sample size: against integrals, and how often they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from RL2.credit.intervals import log_earned, mean_interval


@pytest.mark.parametrize(("ones", "zeros"), [(0, 5), (3, 4), (40, 2), (70, 130)])
def test_what_is_earned_with_two_values_is_the_integral_over_all_bets(ones: int, zeros: int) -> None:
    """With the nodes of the other values, which are the Gauss quadrature of the same integral."""
    closed = log_earned(((0.0, zeros), (1.0, ones)))
    nodes = log_earned(((0.0, zeros), (0.5, 0), (1.0, ones)))
    for m in (0.1, 0.42, 0.9):
        assert nodes(m) == pytest.approx(closed(m), rel=1e-9, abs=1e-9)


def test_ends_are_where_the_bets_have_earned_the_limit() -> None:
    counts = {0.0: 12, 0.3: 7, 1.0: 20}
    low, high = mean_interval(counts, 0.05)
    earned = log_earned(tuple(counts.items()))
    assert low < (0.3 * 7 + 20) / 39 < high
    for end, inwards in ((low, 1e-3), (high, -1e-3)):
        assert earned(end) >= math.log(20) > earned(end + inwards)


def test_no_samples_and_values_that_never_differ() -> None:
    assert mean_interval({}, 0.05) == (0.0, 1.0)
    low, high = mean_interval({1.0: 50}, 0.05)
    assert 0.85 < low < 1
    assert high == 1.0
    assert mean_interval({0.0: 50}, 0.05) == pytest.approx((0.0, 1 - low), abs=1e-3)


def test_values_that_differ_little_have_narrow_intervals() -> None:
    """A bound for all values in [0, 1] with this mean would be as wide as that of coins."""
    narrow, coins = mean_interval({0.49: 100, 0.51: 100}, 0.05), mean_interval({0.0: 100, 1.0: 100}, 0.05)
    assert narrow[1] - narrow[0] < 0.4 * (coins[1] - coins[0])


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_other_values_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"values must be in \[0, 1\]"):
        mean_interval({0.5: 3, value: 1}, 0.05)


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.5, 1.0)])
def test_the_mean_is_held_at_all_sizes_at_once(values: tuple[float, ...]) -> None:
    """At most 5% of 400 sequences may ever leave it: 20 in the mean, and 33 with probability 0.003."""
    rng, alpha = np.random.default_rng(0), 0.05
    left = 0
    for _ in range(400):
        chances = rng.dirichlet(np.ones(len(values)))
        mean, counts = float(chances @ values), dict.fromkeys(values, 0)
        earned_most = 0.0
        for number, value in enumerate(rng.choice(values, 300, p=chances), 1):
            counts[float(value)] += 1
            if number % 10 == 0 and 0 < mean < 1:
                earned_most = max(earned_most, log_earned(tuple(counts.items()))(mean))
        left += earned_most >= -math.log(alpha)
    assert left <= 33
