"""Better, worse, or cannot tell: how often that is right."""

from __future__ import annotations

import numpy as np
import pytest

from RL2.evaluation.compare import compare, sign_test, student


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (10, 2.22814), (200, 1.97190), (1e9, 1.95996)],
)
def test_students_quantiles_are_those_of_the_tables(freedom: float, expected: float) -> None:
    assert student(0.95, freedom) == pytest.approx(expected, rel=1e-4)


def test_the_sign_test_is_exact_for_few() -> None:
    assert sign_test([1.0] * 5 + [0.0] * 50) == pytest.approx(2 / 2**5)
    assert sign_test([1.0, -1.0]) == 1
    assert sign_test([0.0]) == 1
    many = sign_test([1.0] * 20 + [-1.0] * 5)
    assert many == pytest.approx(0.0041, abs=0.002)  # two-sided binomial of 20 in 25


def runs(rng: np.random.Generator, ability_P: np.ndarray, number: int, spread: float, samples: int = 1) -> list:
    """Of a method: each run has an offset of its own, so runs differ by more than the sampling."""
    made = []
    for _ in range(number):
        chance_P = np.clip(ability_P + rng.normal(0, spread), 0, 1)
        scores = rng.binomial(samples, chance_P) / samples
        made.append({f"{p}": float(score) for p, score in enumerate(scores)})
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("problems", "seeds", "spread"), [(200, 1, 0.0), (30, 1, 0.0), (200, 3, 0.03), (100, 2, 0.05)])
def test_no_difference_is_rarely_called_one(problems: int, seeds: int, spread: float) -> None:
    rng = np.random.default_rng(3)
    verdicts = []
    for _ in range(1000):
        ability_P = rng.beta(2, 1, problems)
        verdicts.append(compare(runs(rng, ability_P, seeds, spread), runs(rng, ability_P, seeds, spread)).verdict)
    print({word: verdicts.count(word) for word in set(verdicts)})
    assert verdicts.count("better") <= 50
    assert verdicts.count("worse") <= 50


def test_a_large_difference_is_found_and_a_small_one_is_admitted_to_be_hidden() -> None:
    rng = np.random.default_rng(4)
    found = {0.15: 0, 0.0: 0}
    for _ in range(200):
        ability_P = rng.uniform(0.2, 0.8, 300)
        for gain in found:
            comparison = compare(runs(rng, ability_P, 2, 0.01), runs(rng, ability_P + gain, 2, 0.01))
            found[gain] += comparison.verdict == "better"
    assert found[0.15] > 100
    assert found[0.0] < 20
    comparison = compare(runs(rng, ability_P, 1, 0.0), runs(rng, ability_P, 1, 0.0))
    assert "a difference below" in comparison.words
    assert "between these two runs" in comparison.words


@pytest.mark.slow
def test_the_smallest_difference_is_found_in_four_of_five() -> None:
    rng, found, said = np.random.default_rng(5), 0, []
    for _ in range(400):
        ability_P = rng.uniform(0.2, 0.7, 200)
        said.append(compare(runs(rng, ability_P, 1, 0), runs(rng, ability_P, 1, 0)).smallest)
    for _ in range(400):
        ability_P = rng.uniform(0.2, 0.7, 200)
        found += (
            compare(runs(rng, ability_P, 1, 0), runs(rng, ability_P + float(np.mean(said)), 1, 0)).verdict == "better"
        )
    assert 0.72 <= found / 400 <= 0.88


def test_runs_of_other_problems_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="fewer than two problems in common"):
        compare([{"1": 1.0, "2": 0.0}], [{"3": 1.0, "2": 0.0}])
