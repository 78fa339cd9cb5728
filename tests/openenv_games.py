"""Environments of OpenEnv on a server of the package: `python openenv_games.py NAME`, which prints its port."""

from __future__ import annotations

import socket
import sys
from random import Random
from typing import Any

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
    number: int


class Hint(Observation):
    hint: str


class Guessing(Environment):
    """Guess a number up to 9; the last of three guesses ends the game."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, most: int = 9, **_: Any) -> Hint:
        self.game, self.guesses = Random(seed).randint(0, most), 0
        return Hint(hint=f"A number from 0 to {most}.")

    def step(self, action: Guess, timeout_s: float | None = None, **_: Any) -> Hint:
        self.guesses += 1
        found = action.number == self.game
        hint = "Found." if found else "Higher." if action.number < self.game else "Lower."
        return Hint(hint=hint, reward=1.0 if found else -0.25, done=found or self.guesses == 3)

    @property
    def state(self) -> State:
        return State(step_count=self.guesses)


class Say(Action):
    message: str


class Echoed(Observation):
    echoed_message: str


class Echo(Environment):
    """Repeat messages for ever; a digit in one is rewarded."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Echoed:
        return Echoed(echoed_message=f"Ready {seed}.")

    def step(self, action: Say, timeout_s: float | None = None, **_: Any) -> Echoed:
        reward = float(any(character.isdigit() for character in action.message))
        return Echoed(echoed_message=action.message, reward=reward)

    @property
    def state(self) -> State:
        return State()


class Adding(MCPEnvironment):
    """An environment whose actions are calls of tools."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("adding")

        @server.tool
        def add(a: int, b: int) -> int:
            """Return the sum of two numbers."""
            return a + b

        super().__init__(server)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Observation:
        return Observation(metadata={"question": "2+3?"})

    def _step_impl(self, action: Action, timeout_s: float | None = None, **_: Any) -> Observation:
        raise ValueError("only tools")

    @property
    def state(self) -> State:
        return State()


APPS = {
    "guessing": lambda: create_fastapi_app(Guessing, Guess, Hint, max_concurrent_envs=2),
    "echo": lambda: create_fastapi_app(Echo, Say, Echoed, max_concurrent_envs=2),
    "adding": lambda: create_fastapi_app(Adding, CallToolAction, CallToolObservation, max_concurrent_envs=2),
}

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(APPS[sys.argv[1]](), log_level="warning")).run(sockets=[listening])
