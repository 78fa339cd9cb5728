"""Confidence intervals for scores, one per problem."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev, variance
from typing import NamedTuple


class Estimate(NamedTuple):
    value: float
    low: float
    high: float


def quantile(confidence: float) -> float:
    """z such that a standard normal variable lies within -z and z with probability `confidence`."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def accuracy(scores: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean score with Wilson's interval.

    All p that a score test does not reject: (mean - p)^2 <= z^2 p (1 - p) / n. Unlike mean +- z * standard error it
    stays within 0 and 1 and has a width when every score is the same.
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927); recommended by
    Brown, Cai and DasGupta, "Interval estimation for a binomial proportion", Statistical Science 16 (2001).
    Partial scores are fine: they vary less than 0s and 1s of the same mean, so the interval is then on the wide side.
    """
    if not scores:
        raise ValueError("an interval needs at least one score")
    if not all(0 <= score <= 1 for score in scores):
        raise ValueError("Wilson's interval is for scores between 0 and 1")
    n, mean, z2 = len(scores), fmean(scores), quantile(confidence) ** 2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (mean * (1 - mean) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # at a mean of 0 or 1 the bound is exactly the mean; rounding must not put it past it
    return Estimate(mean, min(mean, max(0.0, centre - half)), max(mean, min(1.0, centre + half)))


def paired_difference(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of `after - before` over the same problems, with the normal interval of the differences.

    Pairing takes out how hard each problem is, which is most of the noise between two models. For scores of 0 and 1
    this is Wald's interval for McNemar's setting. See E. Miller, "Adding error bars to evals", arXiv:2411.00640 (2024),
    on paired differences. Needs a few dozen problems; when no score changes at all the interval has no width.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before and {len(after)} after: they must be of the same problems")
    if len(before) < 2:
        raise ValueError("a paired interval needs at least two problems")
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = fmean(differences)
    half = quantile(confidence) * stdev(differences) / math.sqrt(len(differences))
    return Estimate(mean, mean - half, mean + half)


def unpaired_difference(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Difference of two means of unrelated values, with the normal interval of Welch's unequal variances.

    B. L. Welch, "The significance of the difference between two means when the population variances are unequal",
    Biometrika 29 (1938).
    """
    if len(before) < 2 or len(after) < 2:
        raise ValueError("a difference of means needs at least two values on each side")
    difference = fmean(after) - fmean(before)
    half = quantile(confidence) * math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    return Estimate(difference, difference - half, difference + half)
