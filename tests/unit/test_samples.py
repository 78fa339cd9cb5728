"""pass@k and votes by enumeration; intervals in simulated experiments."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import numpy as np
import pytest

from RL2.evaluation.samples import Sample, majority_at, over_problems, pass_at


def samples(text: str) -> list[Sample]:
    """A letter a sample: capitals are right, '-' has no answer."""
    return [Sample(float(x.isupper()), None if x == "-" else x.lower()) for x in text]


@pytest.mark.parametrize("text", ["AaaB", "aaaa", "AAAA", "AbbbbC-", "Abcdef--A"])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(text: str) -> None:
    of = samples(text)
    for k in range(1, len(of) + 1):
        expected = fmean(any(sample.is_right for sample in subset) for subset in combinations(of, k))
        assert pass_at(k, of) == pytest.approx(expected)
    assert pass_at(1, of) == pytest.approx(fmean(sample.score for sample in of))


def test_the_majority_decides() -> None:
    assert majority_at(3, samples("Abb")) == 0
    assert majority_at(3, samples("AAb")) == 1
    assert majority_at(2, samples("Ab")) == 0.5  # a tie
    assert majority_at(3, samples("A--")) == 1  # who has no answer has no vote
    assert majority_at(2, samples("--")) == 0
    # of the three pairs one is right, one wrong, and two are ties or the same pair
    assert majority_at(2, samples("AAb")) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert majority_at(1, samples("Abb")) == pytest.approx(1 / 3)


def test_votes_of_many_subsets_are_drawn_alike() -> None:
    of = samples("A" * 18 + "b" * 14)
    assert majority_at(15, of) == majority_at(15, of)
    assert majority_at(15, of) == pytest.approx(0.75, abs=0.08)  # hypergeometric: 8 of 15 at least


@pytest.mark.parametrize("k", [0, 5])
def test_what_cannot_be_drawn_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="of 4 samples"):
        pass_at(k, samples("Aaaa"))
    with pytest.raises(ValueError, match="of 4 samples"):
        majority_at(k, samples("Aaaa"))


@pytest.mark.slow
@pytest.mark.parametrize(
    # where few problems are almost all solved, bounds are rather too wide
    ("problems", "a", "b", "most"),
    [(100, 1.0, 1.0, 970), (60, 2.0, 0.5, 980), (120, 0.5, 4.0, 970)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(problems: int, a: float, b: float, most: int) -> None:
    """Problems differ in how hard they are (beta), and four samples of each are drawn; of accuracy and of pass@2."""
    rng = np.random.default_rng(7)
    truths = {1: a / (a + b), 2: 1 - (b * (b + 1)) / ((a + b) * (a + b + 1))}
    covered = dict.fromkeys(truths, 0)
    for _ in range(1000):
        right_P = rng.binomial(4, rng.beta(a, b, problems))
        for k, truth in truths.items():
            value = {c: pass_at(k, samples("A" * c + "b" * (4 - c))) for c in range(5)}
            estimate = over_problems([value[c] for c in right_P.tolist()])
            covered[k] += estimate.low <= truth <= estimate.high
    print(covered)
    assert all(930 <= count <= most for count in covered.values())


def test_where_all_agree_wilson_has_the_word() -> None:
    estimate = over_problems([1.0] * 20)
    assert estimate.value == estimate.high == 1
    assert estimate.low == pytest.approx(1 - 0.1611, abs=1e-4)
