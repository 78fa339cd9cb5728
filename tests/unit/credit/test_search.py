"""The search on tasks whose exact values are known by dynamic programming."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.credit import Task, Told, by_search, coverage, drawn, planted, searched, told, uniformly
from RL2.credit.search import ENOUGH, OTHER, Answer, Place, Search


def coin(chance: float = 0.5) -> Told:
    """Three tokens, of which the second alone decides: 0 wins."""
    chance_TSV = np.tile(np.array([chance, 1 - chance]), (3, 3, 1))
    next_TSV = np.tile(np.arange(3)[None, :, None], (3, 1, 2))
    next_TSV[1, 0] = [1, 2]
    task = Task(chance_TSV, next_TSV, np.array([0.0, 1.0, 0.0]))
    answer = Answer((0, 0, 0), ((chance, chance),) * 3, 1.0, (1, 1, 1))
    return Told(task, answer, [0, 0, 1, 1])


def test_a_continuation_is_a_sample_of_each_place_that_it_goes_through() -> None:
    search = Search(coin().answer)
    assert search.add(Place(0), [0, 0, 1], 1.0) == Place(2, 1)
    search.add(Place(0), [0, 1, 0], 0.0)
    search.add(Place(0), [1, 0, 0], 1.0)
    assert search.add(Place(1), [0, 0], None) is None
    assert search.add(Place(1, 1), [0], 0.0) == Place(1, 1)
    assert {place: dict(counts) for place, counts in search.counts.items()} == {
        Place(0): {1.0: 2, 0.0: 1},
        Place(1): {1.0: 1, 0.0: 1, None: 1},
        Place(2): {1.0: 1, None: 1},
        Place(2, OTHER): {1.0: 1},
        Place(2, 1): {1.0: 1},
        Place(1, OTHER): {0.0: 1},
        Place(1, 1): {0.0: 2},
        Place(0, OTHER): {1.0: 1},
        Place(0, 1): {1.0: 1},
    }


def test_shared_continuations_are_unbiased() -> None:
    """The value of each place is the mean of its own continuations, wherever they began."""
    rng = np.random.default_rng(1)
    of = told(rng, drawn(rng))
    search = Search(of.answer)
    for tokens, reward in of.continued(rng, Place(0), 40_000):
        search.add(Place(0), tokens, reward)
    checked = 0
    for t, true in enumerate(of.value_T[:-1]):
        number = search.number(Place(t))
        if number > 200:
            assert search.value(Place(t)).value == pytest.approx(true, abs=4 * 0.5 / number**0.5)
            checked += 1
        if search.number(Place(t, of.answer.other_T[t])) > 200:
            other = search.value(Place(t, of.answer.other_T[t])).value
            number = search.number(Place(t, of.answer.other_T[t]))
            assert other - true == pytest.approx(of.other(t), abs=4 * 0.5 / number**0.5)
    assert checked >= 3


def test_intervals_hold_after_an_adaptive_search() -> None:
    """Some of the 1,000 repetitions of benchmarks/credit.py: all intervals of an answer hold at once."""
    found = coverage(range(60), budget=6_000)
    assert found["answers_held"] >= 0.95
    assert found["held"] >= 0.95
    assert found["decided_tokens"] > 0.5


def test_the_deciding_token_and_its_alternative_are_found() -> None:
    of = coin()
    search = searched(np.random.default_rng(0), of, 20_000, looks_at_all=True)
    advantages = search.advantages()
    assert [bounds.is_decided for bounds in advantages] == [False, True, False]
    assert advantages[1].low <= 0.5 <= advantages[1].high
    other = search.alternative(1, search.values())
    assert other is not None
    assert other.high < 0
    assert other.low <= of.other(1) == -0.5
    assert search.next(4) == []
    assert of.used < 20_000


def test_a_certain_token_needs_no_sample() -> None:
    search = Search(Answer((7, 7), ((0.99, 1.0), (0.999, 1.0)), 1.0))
    assert search.next(4) == []
    assert all(bounds.size <= 0.02 for bounds in search.advantages())
    assert search.values()[0].low == pytest.approx(0.99 * 0.999)


def test_without_chances_intervals_are_those_of_the_samples_alone() -> None:
    search = Search(Answer((7, 7), ((0.0, 1.0),) * 2, 0.0))
    assert search.values()[0][1:] == (0.0, 1.0)
    for _ in range(ENOUGH):
        search.add(Place(1), [7], 1.0)
    assert search.values()[1].low > 0.2
    assert search.values()[0][1:] == (0.0, 1.0)


def test_unscored_continuations_widen_the_interval_on_both_sides() -> None:
    scored, some = Search(coin().answer), Search(coin().answer)
    for n in range(60):
        scored.add(Place(1, 1), [0], float(n % 2))
        some.add(Place(1, 1), [0], None if n % 6 == 0 else float(n % 2))
    a, b = scored.value(Place(1, 1)), some.value(Place(1, 1))
    assert b.low < a.low < a.high < b.high
    assert b.value == pytest.approx(30 / 50)


def test_the_search_needs_fewer_tokens_than_a_uniform_budget() -> None:
    rng = np.random.default_rng(2)
    of = told(rng, planted(rng, 48, 2))
    used = by_search(rng, Told(of.task, of.answer, of.states))
    assert 5 * used < uniformly(rng, Told(of.task, of.answer, of.states), shares=False)
