"""Which groups train when, on-policy and off: nothing is lost, doubled, out of order or too old."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from rl_settings import rl_config
from transformers import PreTrainedTokenizerBase

from RL2.config.load import load
from RL2.data.cursor import Cursor
from RL2.engines.scripted import ScriptedEngine
from RL2.errors import ConfigError
from RL2.parallel.processes import Processes
from RL2.rollout.environment import load_environment
from RL2.rollout.episodes import Episodes, EpisodeSetting
from RL2.rollout.scheduler import Scheduler
from RL2.types import Completion, Prompt, Sampling, Trajectory

STEPS, WANTED, SAMPLES = 12, 4, 2
SLOW = 5
"""Every so manieth row takes much longer than the others."""

SCRIPT = """
import asyncio
async def step(state, action, extra_info):
    await asyncio.sleep(extra_info["seconds"])
    return {"next_state": state + action, "reward": 1.0, "score": 1.0, "done": False, "extra_info": extra_info}
"""


class Turns(ScriptedEngine):
    """A request takes a moment, so an episode of several turns sees the weights change."""

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        await asyncio.sleep(0.002)
        return await super().generate(token_ids, sampling)


class World:
    """Steps of a loop that trains nothing."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes, overrides: tuple[str, ...]
    ) -> None:
        (folder / "env.py").write_text(SCRIPT)
        self.config = rl_config(
            f"train_data.prompts_per_rollout={WANTED}",
            f"train_data.responses_per_prompt={SAMPLES}",
            "rollout.max_turns=3",
            *overrides,
            program="spo",
        )
        self.engine = Turns(lambda token_ids, sampling: [9, 9])
        self.environment = load_environment(folder / "env.py", 5)
        draw = random.Random(0)
        self.prompts = [
            Prompt(n, "p", [100 + n], {"seconds": 0.15 if n % SLOW == 0 else draw.uniform(0, 0.01)})
            for n in range(WANTED * STEPS)
        ]
        rollout = self.config.rollout
        setting = EpisodeSetting(self.engine, self.environment, tokenizer, rollout.max_turns, max_length=100)
        episodes = Episodes(setting, (), processes, rollout.is_async)
        self.cursor = Cursor(len(self.prompts), WANTED, seed=1)
        self.scheduler = Scheduler(self.prompts, self.cursor, episodes, self.config, STEPS)

    def step(self, step: int) -> list[Trajectory]:
        self.engine.load_weights(iter(()), version=step)
        trajectories = self.scheduler.take(step, lambda done: None)
        assert [(t.group, t.sample) for t in trajectories] == [(g, s) for g in range(WANTED) for s in range(SAMPLES)]
        return trajectories

    def close(self) -> None:
        self.scheduler.close()
        self.environment.close()


@pytest.fixture
def world(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Iterator[World]:
    world = World(tmp_path, tokenizer, processes, request.param)
    yield world
    world.close()


def rows(trajectories: list[Trajectory]) -> list[int]:
    return [t.row for t in trajectories if t.sample == 0]


def ages(step: int, trajectories: list[Trajectory]) -> list[int]:
    return [step - min(t.versions) for t in trajectories]


PARTIAL = ("rollout.max_staleness=2", "rollout.partial_rollout=0.5")
MODES = [(), ("rollout.max_staleness=1",), ("rollout.max_staleness=3",), PARTIAL]


@pytest.mark.slow
@pytest.mark.parametrize("world", MODES, indirect=True, ids=["on-policy", "1 ahead", "3 ahead", "partial"])
def test_a_slow_environment_makes_nothing_too_old_and_loses_nothing(world: World) -> None:
    bound, seen, oldest = world.config.rollout.max_staleness, list[int](), list[int]()
    for step in range(STEPS):
        trajectories = world.step(step)
        seen += rows(trajectories)
        oldest += ages(step, trajectories)
    assert sorted(seen) == list(range(WANTED * STEPS))
    assert not world.scheduler.outstanding
    assert not world.scheduler.pending
    assert max(oldest) == bound
    order = Cursor(len(world.prompts), WANTED, seed=1).next(WANTED * STEPS)
    assert (seen == order) == (not world.config.rollout.partial_rollout)


@pytest.mark.slow
@pytest.mark.parametrize("world", [PARTIAL], indirect=True)
def test_a_partial_rollout_waits_only_for_what_would_be_too_old(world: World) -> None:
    slow = {n for n in range(len(world.prompts)) if n % SLOW == 0}
    late = 0
    for step in range(STEPS - 2):
        trajectories = world.step(step)
        for trajectory, age in zip(trajectories, ages(step, trajectories), strict=True):
            if trajectory.row in slow and trajectory.sample == 0:
                late += age > 0
    assert late >= len(slow) // 2


@pytest.mark.slow
@pytest.mark.parametrize("world", [("rollout.max_staleness=2",), PARTIAL], indirect=True)
def test_a_checkpoint_knows_what_is_under_way(
    world: World, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    seen = [row for step in range(3) for row in rows(world.step(step))]
    state = world.scheduler.state_dict()
    assert len(state["outstanding"]) == state["drawn"] - 3 * WANTED > 0
    overrides = [f"rollout.{key}={getattr(world.config.rollout, key)}" for key in ("max_staleness", "partial_rollout")]
    resumed = World(tmp_path, tokenizer, processes, tuple(overrides))
    resumed.scheduler.load_state_dict(state)
    seen += [row for step in range(3, STEPS) for row in rows(resumed.step(step))]
    resumed.close()
    assert sorted(seen) == list(range(WANTED * STEPS))


def test_partial_rollouts_are_off_policy() -> None:
    settings = ["train_data.path=x", "train_data.prompts_per_rollout=4", "actor.model_name=m", "rollout.env_path=x"]
    settings += ["actor.max_length_per_device=9", "rollout.train_sampling_params.max_new_tokens=4"]
    settings += ["trainer.experiment_name=x"]
    with pytest.raises(ConfigError, match=r"rollout.max_staleness=0 allows none of it"):
        load("spo", [*settings, "rollout.partial_rollout=0.5"])
    with pytest.raises(ConfigError, match=r"actor.select.on_policy has no effect"):
        load("spo", [*settings, "actor.select.on_policy=true"])
