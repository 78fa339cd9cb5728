"""Is one method better than another? Paired by problem, with several runs (seeds) of a method as one group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from RL2.tools.eval.intervals import over_problems, span_of, student

Scores = Mapping[str, float]
"""Problem -> mean score of a run's samples of it."""
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
        of = f"over {self.seeds[0]} and {self.seeds[1]} runs"
        if self.seeds == (1, 1):
            of = "between these two runs (other seeds of the same two methods may differ)"
        elif 1 in self.seeds:
            of += " (the single run's method is taken to vary between seeds as the other does)"
        text = f"{self.verdict}: {self.difference:+.3f} ({interval}) on {self.problems} problems, {of}"
        if self.verdict == "cannot tell":
            text += f"; a difference below {self.smallest:.3f} would mostly go unseen"
        return text


def compare(first: Sequence[Scores], second: Sequence[Scores], confidence: float = 0.95) -> Comparison:
    """Return how much better the runs of the second method are, on the problems that all runs have.

    Two sources of chance. Which problems there are and how they were sampled is seen in the differences by problem,
    with the interval of `over_problems`. How the runs of a method came out is seen in their means. Together they count
    the sampling twice, so the interval is rather too wide.

    With several runs of both, the variances add up, and the quantile is Student's with Satterthwaite's degrees of
    freedom. With several of one, the method with a single run is taken to vary between seeds as the other does, and the
    half-widths of both sources add up: Satterthwaite's degrees of freedom would be too many for a spread of so few runs
    that counts so much, and means of scores are skewed where seeds differ widely. With one run each the answer is about
    these two runs.

    Raises ValueError where they have fewer than two problems in common.
    """
    shared = sorted(set.intersection(*(set(run) for run in (*first, *second))))
    if len(shared) < 2:
        raise ValueError("they have fewer than two problems in common")
    span = span_of([run[p] for run in (*first, *second) for p in shared])
    difference_P = [fmean(run[p] for run in second) - fmean(run[p] for run in first) for p in shared]
    difference, low, high = over_problems(difference_P, confidence, (-span, span))
    below, above = difference - low, high - difference
    means = [[fmean(run[p] for p in shared) for run in runs] for runs in (first, second)]
    several = [of for of in means if len(of) > 1]
    if len(several) == 2:
        parts = [(variance(of) / len(of), len(of) - 1) for of in (difference_P, *several)]
        squared = sum(part for part, _ in parts)
        freedom = squared**2 / sum(part**2 / df for part, df in parts) if squared else math.inf
        half = student(confidence, freedom) * math.sqrt(squared)
        below, above = max(below, half), max(above, half)
    elif several:
        error = math.sqrt(variance(several[0]) * (1 / len(first) + 1 / len(second)))
        half = student(confidence, len(several[0]) - 1) * error
        below, above = below + half, above + half
    z, z_power = NormalDist().inv_cdf((1 + confidence) / 2), NormalDist().inv_cdf(POWER)
    smallest = min(span, max(below, above) * (1 + z_power / z))
    seeds = len(first), len(second)
    return Comparison(difference, difference - below, difference + above, smallest, len(shared), seeds)
