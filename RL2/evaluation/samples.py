"""What several samples of each problem say: accuracy, pass@k and majority votes, with intervals over problems.

Shapes: P problems.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from random import Random
from statistics import fmean

import numpy as np

from RL2.evaluation.intervals import Estimate, accuracy

RESAMPLES = 2000
"""Of the bootstrap: its bounds then move by a tenth of their distance to the mean from one seed to the next."""
SUBSETS = 500
"""Votes of k among n samples: over all subsets, or so many of them."""


@dataclass(frozen=True)
class Sample:
    """One scored response."""

    score: float
    answer: str | None = None
    """What it votes for; None: it has no vote."""

    @property
    def is_right(self) -> bool:
        return self.score > 0


def pass_at(k: int, samples: Sequence[Sample]) -> float:
    """Chance that at least one of k samples is right, without bias from n >= k of them.

    1 - C(n - c, k) / C(n, k) with c right ones: M. Chen et al., "Evaluating large language models trained on code",
    arXiv 2107.03374, equation 1.
    """
    n, c = len(samples), sum(sample.is_right for sample in samples)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples")
    return 1 - comb(n - c, k) / comb(n, k)


def majority_at(k: int, samples: Sequence[Sample]) -> float:
    """Mean score of the answer that most of k samples give, over the subsets of n >= k: without bias, as `pass_at`.

    Answers that tie share the outcome. Samples without an answer do not vote; if none votes, the score is 0.
    """
    n = len(samples)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} of {n} samples")
    if comb(n, k) <= SUBSETS:
        subsets = list(combinations(samples, k))
    else:
        draw = Random(n)  # the same subsets for every model
        subsets = [tuple(draw.sample(samples, k)) for _ in range(SUBSETS)]
    return fmean(_elected(subset) for subset in subsets)


def _elected(samples: Sequence[Sample]) -> float:
    votes: defaultdict[str, list[float]] = defaultdict(list)
    for sample in samples:
        if sample.answer is not None:
            votes[sample.answer].append(sample.score)
    most = max((len(scores) for scores in votes.values()), default=0)
    return fmean(fmean(scores) for scores in votes.values() if len(scores) == most) if most else 0.0


def over_problems(values_P: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of a value of each problem, with the interval of a bootstrap over problems.

    Problems are drawn again, each with all its samples, because these hang together; what varies is which problems
    there are and how they were sampled. The bounds are those of the bootstrap-t (Efron and Tibshirani, "An Introduction
    to the Bootstrap", 1993, chapter 12), which for few problems near 0 or 1 covers better than plain percentiles. Where
    all values are the same it has no width to offer, and Wilson's interval of as many problems takes its place. Scores
    that are not between 0 and 1 have no such: there it is as wide as what was seen.
    """
    values = np.asarray(values_P, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one problem")
    mean = float(values.mean())
    least, most = (0.0, 1.0) if are_shares(values_P) else (-math.inf, math.inf)
    if len(values) < 3 or np.ptp(values) < 1e-12:
        if least == 0:
            return accuracy(list(values_P), confidence)
        return Estimate(mean, min(mean, float(values.min())), max(mean, float(values.max())))
    error = values.std(ddof=1) / len(values) ** 0.5
    drawn = values[np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))]
    errors = drawn.std(axis=1, ddof=1) / len(values) ** 0.5
    means = drawn.mean(axis=1)
    usable = errors > 1e-12
    t = (means[usable] - mean) / errors[usable]
    below, above = np.quantile(t, ((1 - confidence) / 2, (1 + confidence) / 2))
    low, high = float(mean - above * error), float(mean - below * error)
    return Estimate(mean, min(mean, max(least, low)), max(mean, min(most, high)))


def are_shares(scores: Sequence[float]) -> bool:
    """Whether all lie between 0 and 1; an environment may give others."""
    return all(0 <= score <= 1 for score in scores)
