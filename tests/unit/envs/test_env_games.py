"""The games of several roles: rules, payoffs and who hears what."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from envs import debate, kuhn_poker

SEEDS = {tuple(Random(seed).sample(range(3), 2)): seed for seed in range(99)}
"""Cards of both players -> a seed that deals them."""
LINES = (("pass", "pass"), ("bet", "bet"), ("bet", "pass"), ("pass", "bet", "bet"), ("pass", "bet", "pass"))


def played(game: Any, task: dict[str, Any], *answers: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The result, and what each role was told."""
    left, told = iter(answers), []

    async def ask(role: str, said: str) -> str:
        assert role in game.ROLES
        told.append((role, said))
        return next(left)

    return asyncio.run(game.play(ask, task)), told


def test_the_game_has_the_value_of_its_equilibrium() -> None:
    """Kuhn (1950): the first player bets a jack with probability 1/3, a king always; the value is -1/18."""
    assert set(SEEDS) == set(permutations(range(3), 2))
    third = Fraction(1, 3)
    opens = (third, Fraction(0), Fraction(1))  # the first player's chance of a bet, by card
    calls = (Fraction(0), 2 * third, Fraction(1))  # of a bet after pass, bet
    answers = (Fraction(0), third, Fraction(1))  # the second player's, of a bet after a bet
    steals = (third, Fraction(0), Fraction(1))  # after a pass
    value = Fraction(0)
    for (first, second), seed in SEEDS.items():
        for line in LINES:
            result, told = played(kuhn_poker, {"seed": seed}, *line)
            rewards = result["rewards"]
            assert rewards["first"] == -rewards["second"]
            assert [role for role, _ in told] == ["first", "second", "first"][: len(line)]
            assert kuhn_poker.CARDS[first] in told[0][1] and kuhn_poker.CARDS[second] in told[1][1]
            bets = (opens[first], (answers if line[0] == "bet" else steals)[second], calls[first])
            chance = Fraction(1, 6)
            for move, bet in zip(line, bets, strict=False):
                chance *= bet if move == "bet" else 1 - bet
            value += chance * rewards["first"]
    assert value == Fraction(-1, 18)


@pytest.mark.parametrize("answer", ["", "fold", "pass or bet"])
def test_an_illegal_move_loses(answer: str) -> None:
    result, _ = played(kuhn_poker, {"seed": 0}, "I Bet.", answer)
    assert result == {"rewards": {"second": -2, "first": 0}, "metrics": {"illegal": True}}


def test_both_sides_hear_each_other_and_the_judge_hears_all() -> None:
    task = {"prompt": "Is it?", "extra_info": {"answer": "no"}}
    result, told = played(debate, task, "p1", "c1", "p2", "c2", "Not yes, but No.")
    assert told == [
        ("pro", "The question: Is it?"),
        ("con", "The question: Is it?\n\nPRO: p1"),
        ("pro", "CON: c1"),
        ("con", "PRO: p2"),
        ("judge", "The question: Is it?\n\nPRO: p1\n\nCON: c1\n\nPRO: p2\n\nCON: c2"),
    ]
    assert result == {"rewards": {"pro": -1, "con": 1, "judge": True}, "metrics": {"right": True}}
    unknown, _ = played(debate, task | {"extra_info": {}}, "p1", "c1", "p2", "c2", "yes")
    assert unknown == {"rewards": {"pro": 1, "con": -1}}
    with pytest.raises(ValueError, match="the judge gave no answer"):
        played(debate, task, "p1", "c1", "p2", "c2", "Nobody knows.")


def test_scripts_stand_alone() -> None:
    for game in (debate, kuhn_poker):
        assert len(Path(game.__file__).read_text().splitlines()) < 60, "an example fits on a page"
