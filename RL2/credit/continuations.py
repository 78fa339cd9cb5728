"""Continuations of recorded episodes: the episode runs again with its recorded tokens up to a place, and from there on
with an engine's. The environment, its `reset` and its observations are the real ones, so any number of turns works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from torch import Tensor

from RL2.credit.search import Place
from RL2.errors import UserError
from RL2.rollout.episode import request_seed, run_episode
from RL2.rollout.episodes import EpisodeSetting
from RL2.types import Completion, Prompt, Sampling, Trajectory


class Diverged(UserError):
    """A recorded episode that cannot be replayed: the environment did something else this time."""


@dataclass(frozen=True)
class Recorded:
    """An episode as it was sampled, in one sequence."""

    prompt: Prompt
    token_ids: list[int]
    sampled: list[bool]
    """True where the policy sampled the token."""
    group: int
    seed: int
    """Seed of its rollout. With `group` it makes the task of an environment's `reset`."""

    @cached_property
    def tokens(self) -> list[int]:
        """The sampled tokens of all turns."""
        return [token for token, sampled in zip(self.token_ids, self.sampled, strict=True) if sampled]

    @cached_property
    def turns(self) -> list[tuple[int, list[int]]]:
        """Each turn: its beginning in `token_ids`, and its tokens."""
        found, start = [], 0
        for sampled, run in groupby(self.sampled):
            end = start + len(list(run))
            if sampled:
                found.append((start, self.token_ids[start:end]))
            start = end
        return found


@dataclass(frozen=True)
class Continuation:
    """The policy's way from a place to the end."""

    tokens: list[int]
    """Sampled tokens after the place, of all turns."""
    reward: float | None
    """Reward of the whole episode; None: unscored."""


async def continuation(
    recorded: Recorded, place: Place, setting: EpisodeSetting, sampling: Sampling, seed: int
) -> Continuation:
    """Return a continuation of `recorded` from `place`, which `seed` alone makes; at its end, the episode once more.

    Raise Diverged if the environment does not repeat what it did before the place.
    """
    trajectory, tokens = await continued(recorded, place, setting, sampling, seed)
    return Continuation(tokens, None if trajectory.unscored is not None else trajectory.reward)


async def continued(
    recorded: Recorded, place: Place, setting: EpisodeSetting, sampling: Sampling, seed: int
) -> tuple[Trajectory, list[int]]:
    """Return the whole episode that `continuation` plays, and its tokens after the place, of all turns."""
    engine = _Continuing(setting, recorded, place, seed)
    trajectory = await run_episode(
        recorded.prompt,
        engine=engine,
        environment=setting.environment,
        tokenizer=setting.tokenizer,
        sampling=sampling,
        max_turns=setting.max_turns,
        max_length=setting.max_length,
        group=recorded.group,
        sample=0,
        seed=recorded.seed,
        template=setting.template,
    )
    if not engine.is_past:
        cause = f": {trajectory.unscored}" if trajectory.unscored is not None else ""
        raise Diverged(f"the environment ended it after {engine.turn} of {len(recorded.turns)} turns{cause}")
    return trajectory, engine.tokens


class _Continuing:
    """An `Engine` for one episode: recorded tokens up to a place, and then those of another engine."""

    def __init__(self, setting: EpisodeSetting, recorded: Recorded, place: Place, seed: int) -> None:
        self.engine, self.recorded, self.place, self.seed = setting.engine, recorded, place, seed
        self.turn = 0
        self.passed = 0
        """Recorded tokens of earlier turns."""
        self.is_past = False
        """True if the place has been reached."""
        self.tokens: list[int] = []

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        turn, self.turn = self.turn, self.turn + 1
        self._check(token_ids, turn)
        given: list[int] = []
        if not self.is_past:
            own = self.recorded.turns[turn][1]
            left = self.place.at - self.passed
            self.passed += len(own)
            self.is_past = left < len(own) or self.place == Place(len(self.recorded.tokens)) == Place(self.passed)
            given = own[:left] if self.place.token is None or left >= len(own) else [*own[:left], self.place.token]
            if left >= len(own) or (given and self._is_whole(given, sampling)):
                is_end = given[-1] in sampling.stop_token_ids
                return Completion(given, [0.0] * len(given), "stop" if is_end else "length", [0] * len(given))
        request = replace(
            sampling,
            max_new_tokens=sampling.max_new_tokens - len(given),
            seed=request_seed(self.seed, 0, 0, turn),
        )
        completion = await self.engine.generate(token_ids + given, request)
        self.tokens += completion.token_ids
        return replace(
            completion,
            token_ids=given + completion.token_ids,
            logps=[0.0] * len(given) + completion.logps,
            versions=[0] * len(given) + completion.versions,
            experts=None,
        )

    def _check(self, token_ids: list[int], turn: int) -> None:
        """Raise Diverged if the recorded tokens are followed so far, and the environment does not follow them."""
        so_far = [*self.recorded.tokens[: self.place.at], *self.tokens]
        is_followed = self.place.token is None and so_far == self.recorded.tokens[: len(so_far)]
        if self.is_past and not is_followed:
            return
        if turn >= len(self.recorded.turns):
            if self.is_past:
                return  # it goes on where the recorded episode ran into a limit
            raise Diverged(f"the environment goes on after turn {turn}, at which the recorded episode ended")
        start = self.recorded.turns[turn][0]
        if token_ids != self.recorded.token_ids[:start]:
            raise Diverged(
                f"the environment's text before turn {turn + 1} is not the recorded one; its random numbers must "
                "follow from extra_info, and turns with train=False are not recorded"
            )

    @staticmethod
    def _is_whole(given: list[int], sampling: Sampling) -> bool:
        return given[-1] in sampling.stop_token_ids or len(given) >= sampling.max_new_tokens

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        raise NotImplementedError("an episode loads no weights")

    def sleep(self) -> None:
        raise NotImplementedError("an episode does not rest")

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Leave the other engine open: other episodes use it."""
