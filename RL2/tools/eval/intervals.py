"""Confidence intervals for mean scores and for differences of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np

DRAWS = 10_000
"""Number of random draws for values that are not all 0 or 1; its two tails of 2.5% are then accurate to 0.2%."""
POINTS = 401
"""Number of points at which the density of Student's distribution is integrated."""


class Estimate(NamedTuple):
    """An estimate with the limits of its interval."""

    value: float
    low: float
    high: float


def accuracy(scores: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean of scores between 0 and 1 with the interval of `over_problems`.

    Raise ValueError if there are no scores, or if one is not between 0 and 1.
    """
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError("an accuracy needs scores between 0 and 1")
    return over_problems(scores, confidence)


def over_problems(
    values_P: Sequence[float], confidence: float = 0.95, bounds: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """Return the mean of one value per problem [P] with an interval that holds for few problems and near the bounds.

    `bounds` are the smallest and largest value that a problem can have; values beyond them extend them.

    For values that are all at a bound, such as 0s and 1s, this is the exact interval of C. J. Clopper and E. S.
    Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26 (1934).
    For others it is its extension by N. Gaffke, "Three test statistics for a nonparametric one-sided hypothesis on the
    mean of a nonnegative variable", Mathematical Methods of Statistics 14 (2005); see also E. Learned-Miller and P.
    Thomas, arXiv 1905.06208. One more problem is added, with the lower bound as its value for the lower limit and the
    upper bound for the upper limit. The limits are quantiles of the mean of these P + 1 values under random weights
    (Dirichlet, all parameters 1). With many problems this is the normal interval. Coverage is proven for 0s and 1s;
    docs/evaluation.md shows it, by enumeration, for these and for values of three levels.

    Raise ValueError if there are no values, or if `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1")
    values = np.asarray(values_P, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one score")
    least, most = min(bounds[0], float(values.min())), max(bounds[1], float(values.max()))
    tail = (1 - confidence) / 2
    if np.isin(values, (least, most)).all():
        n, right = len(values), int((values == most).sum())
        low, high = _least_chance(right, n, tail), 1 - _least_chance(n - right, n, tail)
        low, high = least + low * (most - least), least + high * (most - least)
    else:
        low, high = _weighted(values, least, most, tail)
    mean = fmean(values.tolist())
    return Estimate(mean, min(mean, low), max(mean, high))


def _least_chance(right: int, n: int, tail: float) -> float:
    """Return the success probability at which `right` or more of n succeed with probability `tail`; 0 for none."""
    if not right:
        return 0.0
    k = np.arange(right, n + 1)
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, n + 1)).cumsum()])
    log_ways = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        reached = np.exp(log_ways + k * math.log(middle) + (n - k) * math.log1p(-middle)).sum()
        low, high = (middle, high) if reached < tail else (low, middle)
    return low


def _weighted(values: np.ndarray, least: float, most: float, tail: float) -> tuple[float, float]:
    """Return the `tail` quantile of the mean under random weights with `least` added, and the upper one with `most`."""
    rng = np.random.default_rng(0)
    added = rng.standard_exponential(DRAWS)
    total, weighted = added.copy(), np.zeros(DRAWS)
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        weight = rng.standard_gamma(count, DRAWS)  # the weight of all problems with this value together
        total += weight
        weighted += value * weight
    low = np.quantile((weighted + least * added) / total, tail)
    high = np.quantile((weighted + most * added) / total, 1 - tail)
    return float(low), float(high)


def paired_difference(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean of `after - before` over the same problems, with the interval of `over_problems`.

    Pairing removes the difficulty of each problem, which is most of the noise between two models. For scores of 0 and 1
    the interval excludes 0 if the exact test of McNemar rejects. See E. Miller, "Adding error bars to evals", arXiv
    2411.00640, on paired differences. Raise ValueError if the numbers of problems differ or are too small.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after: they must be of the same problems")
    if len(before) < 2:
        raise ValueError("a paired interval needs at least two problems")
    span = span_of([*before, *after])
    return over_problems([b - a for a, b in zip(before, after, strict=True)], confidence, (-span, span))


def limits(scores: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and largest possible score: 0 and 1, or the observed extremes beyond them."""
    return min([0.0, *scores]), max([1.0, *scores])


def span_of(scores: Sequence[float]) -> float:
    """Return the largest possible difference of two scores."""
    least, most = limits(scores)
    return most - least


def first_to_last(values: Sequence[float], edge: int, confidence: float = 0.95) -> Estimate:
    """Return the mean of the last `edge` values of a series minus that of the first, with an interval for its noise.

    Neighbouring training steps are correlated, so the interval does not assume independence. It models the noise as a
    first-order autoregression: the difference of values k steps apart has the variance V (1 - r^k) / (1 - r), with V
    the variance of the differences between neighbours and r = 1 + 2 (their lag-1 autocorrelation), which a slow trend
    hardly changes. Differences are clipped at 3 standard deviations: a collapse within a few steps is a change, not
    noise. r is taken one standard error, 2 / sqrt(n), above its estimate, and at most 1 (a random walk). The quantile
    is Student's with 2 (edge - 1) degrees of freedom. The interval does not cover other seeds.

    Raise ValueError if edge < 2 or if the edges overlap.
    """
    if edge < 2 or 2 * edge > len(values):
        raise ValueError(f"{len(values)} values have no two ends of {edge}; each needs at least two")
    series = np.asarray(values, dtype=np.float64)
    difference = float(series[-edge:].mean() - series[:edge].mean())
    steps = np.diff(series)
    deviation = steps - np.median(steps)
    if scale := 1.4826 * float(np.median(abs(deviation))):  # equals the standard deviation of a normal distribution
        deviation = deviation.clip(-3 * scale, 3 * scale)
    squared = float((deviation**2).sum())
    if squared <= 1e-24 * float((series**2).sum()):  # a straight line has no noise
        return Estimate(difference, difference, difference)
    r = 1 + 2 * float((deviation[1:] * deviation[:-1]).sum()) / squared + 2 * len(series) ** -0.5
    r = min(1.0, max(0.0, r))
    # half the variance of the difference of two values k steps apart
    apart_k = squared / (len(steps) - 1) / 2 * np.concatenate([[0.0], (r ** np.arange(len(series) - 1)).cumsum()])
    start = np.arange(edge)
    within = apart_k[abs(start[:, None] - start)].mean()
    across = apart_k[len(series) - edge + start[:, None] - start].mean()
    half = student(confidence, 2 * edge - 2) * math.sqrt(max(0.0, 2 * float(across - within)))
    return Estimate(difference, difference - half, difference + half)


def student(confidence: float, freedom: float) -> float:
    """Return t such that a Student variable with `freedom` degrees is in [-t, t] with probability `confidence`.

    The density is integrated by Simpson's rule, and the quantile is found by bisection.
    """
    if math.isinf(freedom) or freedom > 1e6:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def within(t: float) -> float:
        # x = tan(a) turns the long tail into a short interval
        a = np.linspace(0, math.atan(t), POINTS)
        density = scale * (1 + np.tan(a) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(a) ** 2
        weights = np.where(np.arange(POINTS) % 2, 4.0, 2.0)
        weights[[0, -1]] = 1
        return 2 * float((density * weights).sum()) * (a[1] - a[0]) / 3

    low, high = 0.0, 1e3  # enough for 99.9% at one degree of freedom
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return (low + high) / 2
