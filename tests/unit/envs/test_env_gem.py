"""GEM's games, played through their adapter."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from envs import gem as adapter


def start(seed: int = 3) -> tuple[dict[str, Any], str]:
    extra_info: dict[str, Any] = {"seed": seed}
    (message,) = asyncio.run(adapter.reset(extra_info))
    assert message["role"] == "user"
    return extra_info, message["content"]


def step(extra_info: dict[str, Any], action: str) -> dict[str, Any]:
    return asyncio.run(adapter.step("s", action, extra_info))


def secret(extra_info: dict[str, Any]) -> int:
    return extra_info["game"].game_number


def test_a_game_over_several_turns() -> None:
    extra_info, opening = start()
    assert "guess the number" in opening.lower()
    wrong = next(n for n in range(1, 11) if n != secret(extra_info))
    first = step(extra_info, rf"<think>\boxed{{{secret(extra_info)}}}</think>I say \boxed{{{wrong}}}.")
    assert (first["reward"], first["done"]) == (0.0, False)
    (hint,) = first["next_state"]
    assert f"you guessed {wrong}" in hint["content"] and hint["content"].endswith("Enter your next guess.")
    last = step(extra_info, rf"\boxed{{{secret(extra_info)}}}")
    assert (last["reward"], last["score"], last["done"], last["next_state"]) == (1.0, 1.0, True, None)


def test_the_seed_makes_the_game_and_games_do_not_disturb_each_other() -> None:
    assert start(5)[1] == start(5)[1]
    assert secret(start(5)[0]) == secret(start(5)[0])
    assert len({secret(start(seed)[0]) for seed in range(20)}) > 3
    before = str(adapter.randomness())
    extra_info, _ = start(6)
    step(extra_info, r"\boxed{1}")
    assert str(adapter.randomness()) == before


def test_logging_stays_the_programs_own() -> None:
    assert all(
        not isinstance(handler, logging.StreamHandler) or "pytest" in type(handler).__module__
        for handler in logging.getLogger().handlers
    )


def test_a_megabyte_is_played_at_once() -> None:
    extra_info, _ = start()
    assert step(extra_info, "\\boxed{" * 150_000)["reward"] <= 0
