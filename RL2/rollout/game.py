"""An episode of a script with several roles: `play(ask, task)`, which runs until it waits for answers.

The script runs in the thread of the environment and the engine in another event loop. So the script's coroutine is
advanced in turns: it runs until it has asked for responses, and again with each answer. Only this time counts towards
the time limit of a call, not the time of the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from RL2.config.values import NAME, NAME_RULE
from RL2.rollout.step_result import Unscored, metrics_of, name_of, number_of

FIELDS = {"rewards", "score", "metrics"}
"""Keys of what `play` returns."""
TICKS = 3
"""Rounds of the event loop in which parallel branches of a script ask too, before the first is answered."""
Said = str | list[dict[str, Any]]
"""A text, which goes on with the role's conversation, or all messages of a conversation."""
Play = Callable[..., Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Asked:
    """A response that the script waits for."""

    number: int
    role: str
    said: Said


@dataclass(frozen=True)
class GameResult:
    """A checked result of `play`."""

    rewards: dict[str, float]
    """Role -> its reward."""
    score: float | None
    """None if the script returned none."""
    metrics: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Metric that is no number -> what it is."""


class Game:
    """The script's side of one episode; its methods run in the script's event loop."""

    def __init__(self, play: Play, roles: Mapping[str, str]) -> None:
        """Take the script's function, and the roles that it may ask."""
        self.play, self.roles = play, roles
        self.asked: list[Asked] = []
        """Requests that have not been handed out."""
        self.answers: dict[int, asyncio.Future[str]] = {}
        """Requests without an answer, by number."""
        self.begun = 0
        self.news = asyncio.Event()
        self.script: asyncio.Task[Any] | None = None

    async def begin(self, task: dict[str, Any]) -> list[Asked]:
        """Start the script, and return what it asks for."""
        self.script = asyncio.get_running_loop().create_task(self._run(task))
        self.script.add_done_callback(lambda script: script.cancelled() or script.exception())  # nobody may ask for it
        return await self._until_it_waits()

    async def answer(self, number: int, text: str) -> list[Asked]:
        """Give the script the answer to a request, and return what it asks for then."""
        assert self.script is not None
        if self.script.get_loop() is not asyncio.get_running_loop():
            raise Unscored("another call blocked the event loop of the script, and this episode with it")
        if not (waiting := self.answers.pop(number)).done():  # the script may have given up on it
            waiting.set_result(text)
        return await self._until_it_waits()

    async def ask(self, role: str, said: Said) -> str:
        """Return the response of `role`. The script calls this."""
        if role not in self.roles:
            raise ValueError(f"ask({role!r}, ...): ROLES has {', '.join(self.roles)}")
        if not isinstance(said, str) and not (isinstance(said, list) and all(isinstance(m, dict) for m in said)):
            raise TypeError(f"ask({role!r}, {name_of(said)}); expected a str or a list of messages")
        self.begun += 1
        self.asked.append(Asked(self.begun, role, said))
        self.answers[self.begun] = asyncio.get_running_loop().create_future()
        self.news.set()
        return await self.answers[self.begun]

    @property
    def is_over(self) -> bool:
        return self.script is not None and self.script.done()

    async def result(self) -> GameResult:
        """Return the checked result of the script, or raise what it raised."""
        assert self.script is not None
        return checked_game(self.script.result(), self.roles)

    def cancel(self) -> None:
        """End the script, if it is still at work."""
        if self.script is not None:
            self.script.cancel()

    async def _run(self, task: dict[str, Any]) -> Any:
        try:
            return await self.play(self.ask, task)
        except SystemExit as error:  # it would end the event loop, with all other episodes
            raise RuntimeError("it called sys.exit") from error

    async def _until_it_waits(self) -> list[Asked]:
        """Return the new requests. With others still open, do not wait for any: their answers come first."""
        assert self.script is not None
        if not self.asked and not self.answers:
            news = asyncio.ensure_future(self.news.wait())
            try:
                await asyncio.wait({self.script, news}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
        for _ in range(TICKS):
            await asyncio.sleep(0)
        self.news.clear()
        found, self.asked = self.asked, []
        return found


def checked_roles(given: Any) -> dict[str, str]:
    """Return role -> system prompt, '' for none, of a script's `ROLES`. Raise ValueError if it is not valid."""
    if not isinstance(given, dict | list | tuple) or not given:
        raise ValueError("ROLES must be a list of names, or a dict of names with their system prompts")
    roles = dict(given) if isinstance(given, dict) else dict.fromkeys(given, "")
    for name, system in roles.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ValueError(f"ROLES has {name!r}; {NAME_RULE}")
        if not isinstance(system, str):
            raise ValueError(f"ROLES[{name!r}] is {name_of(system)}; expected its system prompt")
    return roles


def checked_game(result: Any, roles: Mapping[str, str], what: str = "play returned") -> GameResult:
    """Return the result of an episode of `roles`. Raise Unscored, which begins with `what`, if it has another form."""
    if not isinstance(result, dict):
        raise Unscored(f"{what} {name_of(result)}; expected a dict")
    if unknown := sorted(map(repr, result.keys() - FIELDS)):
        raise Unscored(f"{what} {', '.join(unknown)}; expected rewards, and perhaps score and metrics")
    rewards = result.get("rewards")
    if not isinstance(rewards, dict) or not rewards:
        raise Unscored(f"{what} rewards={name_of(rewards)}; expected a dict with the reward of each role")
    if unknown := [repr(role) for role in rewards if role not in roles]:
        raise Unscored(f"{what} a reward of {', '.join(unknown)}; the roles are {', '.join(roles)}")
    numbers = {role: number_of(value, f"rewards[{role!r}]", what) for role, value in rewards.items()}
    score = None if result.get("score") is None else number_of(result["score"], "score", what)
    return GameResult(numbers, score, *metrics_of(result.get("metrics")))
