"""Intervals for the mean of rewards that hold at every sample size at once, however the sampling was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np

NODES = 128
"""Number of bets in the mixture for values other than 0 and 1."""
HALVINGS = 14
"""Halvings of the range in which an end of an interval is searched; the outer limit of what is left is the end."""


def mean_interval(counts: Mapping[float, int], alpha: float) -> tuple[float, float]:
    """Return an interval for the mean of values in [0, 1]; `counts` has the number of samples of each value.

    With probability of at least 1 - `alpha` it holds the mean at all sample sizes at once (a confidence sequence), so
    whether to go on sampling may depend on it. It is the set of means m against which betting has earned less than 1 /
    `alpha` (I. Waudby-Smith and A. Ramdas, arXiv 2010.09686): a bet q multiplies its money by
    x q / m + (1 - x) (1 - q) / (1 - m) at the value x, which is 1 on average if the mean is m. The money is spread over
    all q as Beta(1/2, 1/2) (the universal portfolio of F. Orabona and K. Jun, arXiv 2110.14099; with values of 0 and 1
    the mixture of H. Robbins, Annals of Mathematical Statistics 41, 1970). It is log-convex in m and at most 1 at the
    sample mean, so the set is an interval around that.

    Raise ValueError for a value outside [0, 1].
    """
    if not all(0 <= value <= 1 for value in counts):
        raise ValueError(f"values must be in [0, 1], and one is {max(counts, key=lambda value: abs(value - 0.5))}")
    return _interval(tuple(sorted((value, number) for value, number in counts.items() if number)), alpha)


@lru_cache(maxsize=1 << 16)
def _interval(counts: tuple[tuple[float, int], ...], alpha: float) -> tuple[float, float]:
    number = sum(count for _, count in counts)
    if not number:
        return 0.0, 1.0
    mean = sum(value * count for value, count in counts) / number
    earned = log_earned(counts)
    limit = -math.log(alpha)

    def end(outside: float) -> float:
        inside = mean
        if abs(outside - mean) < 1e-9:
            return outside
        for _ in range(HALVINGS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if earned(middle) < limit else (inside, middle)
        return outside

    return end(0.0), end(1.0)


def log_earned(counts: tuple[tuple[float, int], ...]) -> Callable[[float], float]:
    """Return the logarithm of what the bets have earned against a mean, as a function of the mean in (0, 1)."""
    number = dict(counts)
    if number.keys() <= {0.0, 1.0}:
        ones, zeros = number.get(1.0, 0), number.get(0.0, 0)
        log_beta = (
            math.lgamma(ones + 0.5) + math.lgamma(zeros + 0.5) - math.lgamma(ones + zeros + 1) - math.log(math.pi)
        )
        return lambda m: log_beta - ones * math.log(m) - zeros * math.log1p(-m)
    # equal weights at these nodes are the Gauss quadrature of Beta(1/2, 1/2); any weights make a valid mixture
    bet_J = np.sin(np.pi * (2 * np.arange(NODES) + 1) / (4 * NODES)) ** 2
    value_K1, count_K = np.array([value for value, _ in counts])[:, None], np.array([count for _, count in counts])

    def of_nodes(m: float) -> float:
        log_J = count_K @ np.log(value_K1 * bet_J / m + (1 - value_K1) * (1 - bet_J) / (1 - m))
        most = log_J.max()
        return float(most + np.log(np.exp(log_J - most).mean()))

    return of_nodes
