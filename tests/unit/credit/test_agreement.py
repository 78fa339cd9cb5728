"""Agreement of pulls with advantages, on cases that can be counted by hand."""

from __future__ import annotations

import pytest

from RL2.credit.agreement import agreement, kendall, rank_correlation
from RL2.credit.search import Bounds


def test_rank_correlation_with_ties() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 40, 80]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [8, 4, 2, 1]) == pytest.approx(-1)
    # ranks 1.5, 1.5, 3 and 1, 2, 3: covariance 1.5, squares 1.5 and 2
    assert rank_correlation([0, 0, 5], [1, 2, 3]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def test_agreement_on_decisive_tokens() -> None:
    advantages = [Bounds(0.5, 0.2, 0.8), Bounds(0.0, -0.1, 0.1), Bounds(-0.4, -0.6, -0.1), Bounds(0.02, -0.1, 0.1)]
    found = agreement([3.0, 1.0, 1.0, 0.0], advantages)
    assert found["share"] == pytest.approx(4 / 5)
    assert found["sign"] == pytest.approx(1 / 2)  # one towards its advantage, one against it
    assert found["random"] == pytest.approx(1 / 2)
    assert agreement([3.0, 1.0, 0.0, 0.0], advantages)["sign"] == pytest.approx(3 / 4)
    assert agreement([-0.5, 0, 0.4, 0], advantages)["signed"] == pytest.approx(-0.9486832980505138)


def test_nothing_decisive_and_nothing_pulled() -> None:
    assert agreement([1.0, 2.0], [Bounds(0.0, -0.1, 0.1), Bounds(0.1, -0.1, 0.2)]).keys() == {"rank", "signed"}
    found = agreement([0.0, 0.0], [Bounds(0.5, 0.2, 0.8), Bounds(0.0, -0.1, 0.1)])
    assert "share" not in found
    assert found["sign"] == 0.5


def test_kendall() -> None:
    assert kendall([1, 2, 3], [4, 5, 6]) == pytest.approx(1)
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall([1, 1], [1, 2]) == 0
