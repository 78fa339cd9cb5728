"""Agreement of the numbers of an objective with the measured advantages of tokens.

Shapes: T tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from RL2.credit.search import Bounds


def rank_correlation(a_T: Sequence[float] | np.ndarray, b_T: Sequence[float] | np.ndarray) -> float:
    """Return Spearman's rank correlation, ties with their mean rank; 0 if all of one are equal: it ranks nothing."""
    ranks = [_ranks(np.asarray(values, float)) for values in (a_T, b_T)]
    deviations = [rank_T - rank_T.mean() for rank_T in ranks]
    scale = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float(deviations[0] @ deviations[1]) / scale if scale else 0.0


def _ranks(values_T: np.ndarray) -> np.ndarray:
    _, place_T, counts = np.unique(values_T, return_inverse=True, return_counts=True)
    means = counts.cumsum() - (counts - 1) / 2
    ranks: np.ndarray = means[place_T]
    return ranks


def agreement(pull_T: Sequence[float], advantages_T: Sequence[Bounds]) -> dict[str, float]:
    """Return how well an objective's pull on the tokens of an answer agrees with their advantages.

    `rank`: rank correlation of the sizes of both. `signed`: of both with their signs. Of the decisive tokens, whose
    interval excludes 0: `share` is their share of the sum of absolute pulls, and `sign` the share of them that are
    pulled towards their advantage; a pull of 0 counts as half. These two are missing without a decisive token, `share`
    also without any pull. `random` is the share of tokens that are decisive, which is what equal pulls would have.
    """
    pulls: np.ndarray = np.asarray(pull_T, float)
    values = np.array([bounds.value for bounds in advantages_T])
    decisive = np.array([bounds.is_decided for bounds in advantages_T])
    found = {"rank": rank_correlation(np.abs(pulls), np.abs(values)), "signed": rank_correlation(pulls, values)}
    if decisive.any():
        found["sign"] = float((1 + np.sign(pulls[decisive]) * np.sign(values[decisive])).mean() / 2)
        found["random"] = float(decisive.mean())
        if total := float(abs(pulls).sum()):
            found["share"] = float(abs(pulls[decisive]).sum()) / total
    return found


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Kendall's tau-b of two series: the agreement of the order of all pairs, from -1 to 1."""
    pairs = np.triu_indices(len(a), 1)
    signs = [np.sign(np.subtract.outer(values, values))[pairs] for values in (np.array(a), np.array(b))]
    scale = float(np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum()))
    return float(signs[0] @ signs[1]) / scale if scale else 0.0
