"""Games of GEM (package gem-llm), over several turns: GEM_ENV=game:GuessTheNumber-v0-easy names the game.

No prompt file is needed: `reset` starts a game from the seed that all samples of a prompt share. GEM_CONFIG, a JSON
object, has the settings of the game. Each observation is a user message. Allow as many turns as a game needs
(rollout.max_turns); the sum of its rewards is the score.

Not supported: ids with `rg:` (use reasoning_gym.py), `math:` (use orz.py), and `code:`, which run text of the model.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .gsm8k import behind_reasoning

ENV = os.environ.get("GEM_ENV", "game:GuessTheNumber-v0-easy")
CONFIG = json.loads(os.environ.get("GEM_CONFIG", "{}"))
KINDS = ("game:", "logic:", "qa:")
LONGEST = 10_000
"""Number of final characters of a response that a game reads; it searches moves with its own regular expressions."""


def load_gem() -> Any:
    """Import the package and restore the logging configuration that it changes."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        import gem
        import gem.envs  # registers the games
    except ModuleNotFoundError as error:
        how = "pip install 'rl2-spo[gem]' && pip install --no-deps gem-llm"
        raise ModuleNotFoundError(f"it needs gem-llm: {how} ({error})") from error
    root.handlers[:] = handlers
    root.setLevel(level)
    return gem


gem = load_gem()
if not ENV.startswith(KINDS):
    raise ValueError(f"GEM_ENV={ENV}: expected an id that starts with one of {', '.join(KINDS)}")


async def reset(extra_info: dict[str, Any]) -> list[dict[str, Any]]:
    with own_randomness(extra_info):
        random.seed(extra_info["seed"])
        game = extra_info["game"] = gem.make(ENV, **CONFIG)
        observation, info = game.reset(seed=extra_info["seed"] % 2**32)
    return [message(observation, info)]


async def step(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    move = behind_reasoning(action, state)[-LONGEST:]
    with own_randomness(extra_info):
        observation, reward, terminated, truncated, info = extra_info["game"].step(move)
    done = bool(terminated or truncated)
    next_state = None if done else [message(observation, info)]
    return {
        "next_state": next_state,
        "reward": float(reward),
        "score": float(reward),
        "done": done,
        "extra_info": extra_info,
    }


def message(observation: str, info: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": "\n".join(filter(None, [observation.rstrip(), info.get("suffix")]))}


@contextmanager
def own_randomness(extra_info: dict[str, Any]) -> Iterator[None]:
    """Give a game its own random state within the `with` block and restore the process's state afterwards."""
    outside = randomness()
    if "randomness" in extra_info:
        set_randomness(extra_info["randomness"])
    try:
        yield
    finally:
        extra_info["randomness"] = randomness()
        set_randomness(outside)


def randomness() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()  # noqa: NPY002


def set_randomness(state: tuple[Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
