"""Kuhn poker, the smallest game with bluffs: two players, three cards, one bet. For self-play.

There are no rows: the seed of a task deals the cards, and all samples of a prompt have the same deal. The winner gets
what the loser pays, 1 or 2. An answer that is no move loses 2, and the other player gets nothing for it. Allow all
turns with rollout.max_turns=3. Against a perfect player, the first loses 1/18 a game and the second gains it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable
from typing import Any

RULES = """You play poker with three cards: jack, queen and king. Each player puts 1 into the pot and gets one card.
A move is 'pass' or 'bet', which puts 1 more into the pot. After a bet, 'pass' gives up and 'bet' shows the cards.
After two passes, too, the higher card wins. Answer with one word: pass or bet."""
ROLES = {"first": RULES, "second": RULES}
CARDS = ("jack", "queen", "king")
SHOWN = {"pass pass": 1, "bet bet": 2, "pass bet bet": 2}
"""Moves after which the cards are shown, and what the higher one wins."""
GIVEN_UP = {"bet pass": 1, "pass bet pass": -1}
"""Moves with which a player gives up, and what the first player wins."""


async def play(ask: Callable[..., Awaitable[str]], task: dict[str, Any]) -> dict[str, Any]:
    first, second = random.Random(task["seed"]).sample(range(3), 2)
    cards, moves = {"first": first, "second": second}, ""
    while moves not in SHOWN | GIVEN_UP:
        role, other = ("second", "first") if moves in ("pass", "bet") else ("first", "second")
        heard = f"The moves so far: {moves}." if moves else "You begin."
        answer = await ask(role, f"Your card: {CARDS[cards[role]]}. {heard}")
        found = set(re.findall("pass|bet", answer.lower()))
        if len(found) != 1:
            return {"rewards": {role: -2, other: 0}, "metrics": {"illegal": True}}
        moves = f"{moves} {found.pop()}".strip()

    won = GIVEN_UP.get(moves) or SHOWN[moves] * (1 if first > second else -1)
    return {"rewards": {"first": won, "second": -won}, "metrics": {"illegal": False}}
