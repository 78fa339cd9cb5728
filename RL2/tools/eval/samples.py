"""Metrics over several samples of one problem: pass@k and majority votes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from random import Random
from statistics import fmean

SUBSETS = 500
"""Limit of the subsets of k among n samples that a vote uses; if there are more, this many are drawn."""


@dataclass(frozen=True)
class Sample:
    """One scored response."""

    score: float
    answer: str | None = None
    """Answer that the sample votes for; None if it does not vote."""
    reward: float | None = None
    """Sum of the rewards; None if it was not stored."""

    @property
    def is_right(self) -> bool:
        """True if the reward (or the score, if there is none) is above 0; a score may give partial credit."""
        return (self.score if self.reward is None else self.reward) > 0


def pass_at(k: int, samples: Sequence[Sample]) -> float:
    """Return an unbiased estimate of the probability that at least one of k samples is right, from n >= k samples.

    It is 1 - C(n - c, k) / C(n, k) with c right ones: M. Chen et al., "Evaluating large language models trained on
    code", arXiv 2107.03374, equation 1. Raise ValueError unless 1 <= k <= n.
    """
    n, c = len(samples), sum(sample.is_right for sample in samples)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples")
    return 1 - comb(n - c, k) / comb(n, k)


def majority_at(k: int, samples: Sequence[Sample]) -> float:
    """Return an unbiased estimate of the score of the majority answer of k samples, from n >= k samples.

    Tied answers share the outcome. Samples without an answer do not vote; if none votes, the score is 0. Raise
    ValueError unless 1 <= k <= n.
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
