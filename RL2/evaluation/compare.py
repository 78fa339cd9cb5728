"""Is one method better than another? Paired by problem, with several runs (seeds) of a method as one group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

import numpy as np

Scores = Mapping[str, float]
"""Problem -> mean score of a run's samples of it."""
FLIPS = 10_000
POINTS = 401
POWER = 0.8


@dataclass(frozen=True)
class Comparison:
    """How much better the second is than the first, in the score's own unit."""

    difference: float
    low: float
    high: float
    """The 95% interval."""
    smallest: float
    """The smallest true difference that would have been found in four of five such comparisons."""
    problems: int
    """That both have."""
    seeds: tuple[int, int]

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "cannot tell"

    @property
    def words(self) -> str:
        interval = f"{self.low:+.3f} to {self.high:+.3f}"
        of = "between these two runs" if self.seeds == (1, 1) else f"over {self.seeds[0]} and {self.seeds[1]} runs"
        text = f"{self.verdict}: {self.difference:+.3f} ({interval}) on {self.problems} problems, {of}"
        if self.verdict == "cannot tell":
            text += f"; a difference below {self.smallest:.3f} would mostly go unseen"
        return text


def compare(first: Sequence[Scores], second: Sequence[Scores], confidence: float = 0.95) -> Comparison:
    """Of the runs of two methods, on the problems that all of them have.

    Two sources of chance: which problems there are and how they were sampled (seen in the differences by problem), and
    with several runs of a method how its runs came out (seen in their means). Their variances add up, which counts the
    sampling twice, so the interval is rather too wide. The quantile is Student's, with Satterthwaite's degrees of
    freedom. With one run each the second is not known, and the answer is about these runs. There a test of the signs
    has to agree (each problem's difference may as well have been the other way round), because with few problems that
    differ the normal interval claims too much.
    """
    shared = sorted(set.intersection(*(set(run) for run in (*first, *second))))
    if len(shared) < 2:
        raise ValueError("they have fewer than two problems in common")
    difference_P = [fmean(run[p] for run in second) - fmean(run[p] for run in first) for p in shared]
    parts = [(variance(difference_P) / len(shared), len(shared) - 1)]
    parts += [
        (variance([fmean(run[p] for p in shared) for run in runs]) / len(runs), len(runs) - 1)
        for runs in (first, second)
        if len(runs) > 1
    ]
    squared = sum(part for part, _ in parts)
    freedom = squared**2 / sum(part**2 / df for part, df in parts) if squared else math.inf
    difference, error = fmean(difference_P), squared**0.5
    quantile = student(confidence, freedom)
    half = quantile * error
    if len(first) == len(second) == 1 and half < abs(difference) and sign_test(difference_P) > 1 - confidence:
        half = abs(difference)  # just not excluded
    smallest = (quantile + NormalDist().inv_cdf(POWER)) * error
    return Comparison(
        difference, difference - half, difference + half, smallest, len(shared), (len(first), len(second))
    )


def sign_test(difference_P: Sequence[float]) -> float:
    """Probability of a mean as far from 0, either way, if the sign of each difference were a coin's."""
    values = np.array([d for d in difference_P if d])
    if not len(values):
        return 1.0
    if len(values) <= 13:  # all of them
        signs = 1 - 2 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
        return float((np.abs(signs @ values) >= abs(values.sum()) - 1e-9).mean())
    signs = np.random.default_rng(0).choice((-1, 1), size=(FLIPS, len(values)))
    return float((1 + (np.abs(signs @ values) >= abs(values.sum()) - 1e-9).sum()) / (1 + FLIPS))


def student(confidence: float, freedom: float) -> float:
    """t such that a Student variable of `freedom` degrees lies within -t and t with probability `confidence`.

    The density is integrated by Simpson's rule and the quantile found by halving.
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
