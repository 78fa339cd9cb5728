"""Continuations of recorded episodes, with an engine that says what a test wants and the real episode loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.credit.continuations import Continuation, Diverged, Recorded, continuation
from RL2.credit.search import Place
from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.environment import Environment, environment_of
from RL2.rollout.episodes import EpisodeSetting
from RL2.types import Prompt, Sampling, Trajectory

calls = {"count": 0}


async def counted(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    """Three turns; the reward is the number of sevens in all of them, and the observation names the turn."""
    turn, sevens = extra_info.get("turn", 0) + 1, extra_info.get("sevens", 0) + action.count("7")
    return {
        "next_state": f"{state}{action} turn {turn}:",
        "reward": float(sevens) if turn == 3 else 0.0,
        "score": 0.0,
        "done": turn == 3,
        "extra_info": {"turn": turn, "sevens": sevens},
    }


async def forgetful(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    """An environment with random numbers of its own."""
    calls["count"] += 1
    result = await counted(state, action, extra_info)
    return result | {"next_state": f"{state}{action} call {calls['count']}:"}


class World:
    """An episode as it was recorded, and an engine for its continuations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, environment: Environment) -> None:
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)
        self.sampling = Sampling(8, stop_token_ids=(self.end,), seed=1)
        self.engine = ScriptedEngine(lambda ids, sampling: [*self.ids("7"), self.end])
        self.setting = EpisodeSetting(self.engine, environment, tokenizer, 4, None)
        trajectory = self.played(environment)
        (sequence,) = trajectory.sequences
        self.reward = trajectory.reward
        self.recorded = Recorded(self.prompt, sequence.token_ids.tolist(), sequence.action_mask.tolist(), 0, 0)

    @property
    def prompt(self) -> Prompt:
        return Prompt(0, "Count:", self.ids("Count:"), {})

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def played(self, environment: Environment) -> Trajectory:
        said = iter(["1 7 2", "33", "7"])
        engine = ScriptedEngine(lambda ids, sampling: [*self.ids(next(said)), self.end])
        setting = EpisodeSetting(engine, environment, self.tokenizer, 4, None)

        async def play() -> Trajectory:
            (task,) = setting.begin(self.prompt, self.sampling, number=1, group=0, seed=0)
            return await task

        return asyncio.run(play())

    def continued(self, place: Place, seed: int = 5) -> Continuation:
        return asyncio.run(continuation(self.recorded, place, self.setting, self.sampling, seed))


@pytest.fixture
def world(tokenizer: PreTrainedTokenizerBase) -> World:
    return World(tokenizer, environment_of(counted))


def test_the_end_is_the_episode_again(world: World) -> None:
    assert world.reward == 2
    assert world.continued(Place(len(world.recorded.tokens))) == Continuation([], 2.0)
    assert world.engine.requests == []


def test_every_place_of_every_turn(world: World) -> None:
    """The engine gets the recorded prefix, says 7 in the rest of that turn and in all later ones."""
    turns = world.recorded.turns
    assert len(turns) == 3
    passed = 0
    for number, (start, tokens) in enumerate(turns):
        for k in range(len(tokens)):
            world.engine.requests.clear()
            found = world.continued(Place(passed + k))
            ids, sampling = world.engine.requests[0]
            assert ids == world.recorded.token_ids[: start + k]
            assert sampling.max_new_tokens == 8 - k
            before = "".join(world.tokenizer.decode(of) for _, of in turns[:number])
            sevens = (before + world.tokenizer.decode(tokens[:k])).count("7")
            assert found.reward == sevens + len(turns) - number
            assert len(world.engine.requests) == 3 - number
            assert found.tokens == [*world.ids("7"), world.end] * (3 - number)
        passed += len(tokens)


def test_an_alternative_takes_the_place_of_the_next_token(world: World) -> None:
    (seven,) = world.ids("7")
    found = world.continued(Place(0, seven))
    assert world.engine.requests[0][0] == [*world.ids("Count:"), seven]
    assert found.reward == 4
    world.engine.requests.clear()
    ended = world.continued(Place(1, world.end))  # it ends the turn by itself
    assert len(world.engine.requests) == 2
    assert ended.reward == 2


def test_seeds_differ_by_continuation_and_turn(world: World) -> None:
    world.continued(Place(0), seed=5)
    world.continued(Place(0), seed=6)
    assert len({sampling.seed for _, sampling in world.engine.requests}) == 6


def test_an_environment_with_its_own_random_numbers_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    world = World(tokenizer, environment_of(forgetful))
    with pytest.raises(Diverged, match="text before turn 2 is not the recorded one"):
        world.continued(Place(len(world.recorded.tokens)))


def test_an_episode_that_ends_before_the_place_is_refused(world: World) -> None:
    async def impatient(state: str, action: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        return await counted(state, action, extra_info | {"turn": 2})

    setting = EpisodeSetting(world.engine, environment_of(impatient), world.tokenizer, 4, None)
    place = Place(len(world.recorded.tokens) - 1)
    with pytest.raises(Diverged, match="ended it after 1 of 3 turns"):
        asyncio.run(continuation(world.recorded, place, setting, world.sampling, 0))
