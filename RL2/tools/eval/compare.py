"""Paired comparison of two methods by problem, with one or more runs (seeds) of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from RL2.tools.eval.intervals import over_problems, span_of, student

Scores = Mapping[str, float]
"""Problem -> mean score of a run's samples."""
POWER = 0.8


@dataclass(frozen=True)
class Comparison:
    """Improvement of the second method over the first, in the unit of the score."""

    difference: float
    low: float
    high: float
    """Upper limit of the 95% interval; `low` is the lower one."""
    smallest: float
    """Smallest true difference that would be detected in four of five such comparisons."""
    problems: int
    """Number of problems that both have."""
    seeds: tuple[int, int]

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "cannot tell"

    @property
    def words(self) -> str:
        interval = f"{self.low:+.3f} to {self.high:+.3f}"
        scope = f"over {self.seeds[0]} and {self.seeds[1]} runs"
        if self.seeds == (1, 1):
            scope = "between these two runs (other seeds of the same two methods may differ)"
        elif 1 in self.seeds:
            scope += " (the single run's method is assumed to vary between seeds like the other)"
        text = f"{self.verdict}: {self.difference:+.3f} ({interval}) on {self.problems} problems, {scope}"
        if self.verdict == "cannot tell":
            text += f"; a difference below {self.smallest:.3f} would mostly go undetected"
        return text


def compare(first: Sequence[Scores], second: Sequence[Scores], confidence: float = 0.95) -> Comparison:
    """Return the improvement of the second method's runs over the first's, on the problems that all runs share.

    There are two sources of chance. The choice of problems and the sampling show in the differences by problem; their
    interval is that of `over_problems`. The variation between seeds shows in the means of the runs. Together they count
    the sampling twice, so the interval is slightly too wide.

    With several runs of both methods, the variances add up, and the quantile is Student's with Satterthwaite's degrees
    of freedom. With several runs of only one, the other is assumed to vary between seeds in the same way, and the
    half-widths of both sources add up: Satterthwaite's degrees of freedom would be too many for so few runs, and means
    of scores are skewed if seeds differ widely. With one run each, the result is about these two runs.

    Raise ValueError if they share fewer than two problems.
    """
    shared = sorted(set.intersection(*(set(run) for run in (*first, *second))))
    if len(shared) < 2:
        raise ValueError("they share fewer than two problems")
    span = span_of([run[p] for run in (*first, *second) for p in shared])
    difference_P = [fmean(run[p] for run in second) - fmean(run[p] for run in first) for p in shared]
    difference, low, high = over_problems(difference_P, confidence, (-span, span))
    below, above = difference - low, high - difference
    means = [[fmean(run[p] for p in shared) for run in runs] for runs in (first, second)]
    several = [scores for scores in means if len(scores) > 1]
    if len(several) == 2:
        parts = [(variance(x) / len(x), len(x) - 1) for x in (difference_P, *several)]
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
