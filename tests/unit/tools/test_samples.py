"""pass@k and votes by enumeration."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from RL2.tools.eval.samples import Sample, majority_at, pass_at


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


def test_partial_credit_is_not_right() -> None:
    """The reward decides, as in training, where it is known."""
    of = [Sample(0.01, reward=0.0), Sample(0.9, reward=0.0), Sample(0.9, reward=-1.0), Sample(0.0, reward=0.5)]
    assert [sample.is_right for sample in of] == [False, False, False, True]
    assert pass_at(1, of) == 0.25
    assert [Sample(score).is_right for score in (0.0, 0.01, -1.0)] == [False, True, False]
