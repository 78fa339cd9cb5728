"""Many episodes at once: their order, their groups, their numbers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from RL2.engines.scripted import ScriptedEngine
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.episodes import EpisodeSetting, Group, finish
from RL2.rollout.metrics import (
    drop_equal_groups,
    raise_if_all_unscored,
    rollout_metrics,
    scored,
    unscored_causes,
)
from RL2.types import Completion, Prompt, Sampling, Sequence, Trajectory

SCRIPT = """
async def step(state, action, extra_info):
    extra_info["seen"].append(action)
    return {"next_state": None, "reward": len(extra_info["seen"]), "score": len(action), "done": True,
            "extra_info": extra_info}
"""
SAMPLING = Sampling(max_new_tokens=4)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    (tmp_path / "env.py").write_text(SCRIPT)
    environment = load_environment(tmp_path / "env.py", 5)
    yield environment
    environment.close()


@pytest.fixture
def gather(environment: Environment, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[Trajectory]]:
    def gather(
        engine: Any,
        *,
        sampling: Sampling = SAMPLING,
        responses_per_prompt: int = 2,
        max_turns: int = 1,
        max_length: int | None = None,
        seed: int = 0,
        first_group: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[Trajectory]:
        prompts = [Prompt(10 + i, f"p{i}", [100 + i], {"seen": []}) for i in range(3)]
        setting = EpisodeSetting(engine, environment, tokenizer, max_turns, max_length)

        async def everything() -> list[Trajectory]:
            groups = [
                Group(setting.begin(prompt, sampling, number=responses_per_prompt, group=group, seed=seed), group)
                for group, prompt in enumerate(prompts, first_group)
            ]
            return await finish(groups, progress)

        return asyncio.run(everything())

    return gather


Gather = Callable[..., list[Trajectory]]


def test_order_is_fixed(gather: Gather) -> None:
    class Uneven(ScriptedEngine):
        """Later requests are answered first."""

        async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
            turn = len(self.requests)
            completion = await super().generate(token_ids, sampling)
            await asyncio.sleep(0.05 - turn / 200)
            return completion

    engine, ticks = Uneven(lambda token_ids, sampling: [token_ids[0], 9]), list[int]()
    trajectories = gather(engine, first_group=5, progress=ticks.append)
    assert [(t.row, t.group, t.sample) for t in trajectories] == [
        (10, 5, 0), (10, 5, 1), (11, 6, 0), (11, 6, 1), (12, 7, 0), (12, 7, 1)
    ]  # fmt: skip
    assert [t.sequences[0].token_ids.tolist() for t in trajectories] == [
        [i, i, 9] for i in (100, 100, 101, 101, 102, 102)
    ]
    assert [token_ids for token_ids, _ in engine.requests] == [[i] for i in (100, 100, 101, 101, 102, 102)]
    assert ticks == [1] * 6


def test_the_same_seed_makes_the_same_requests(gather: Gather) -> None:
    def seeds(seed: int) -> list[int]:
        engine = ScriptedEngine(lambda token_ids, sampling: [9])
        gather(engine, seed=seed)
        return [sampling.seed for _, sampling in engine.requests]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 12


def test_samples_of_a_prompt_do_not_see_each_other(gather: Gather) -> None:
    assert [t.reward for t in gather(ScriptedEngine(lambda token_ids, sampling: [9]))] == [1.0] * 6


def test_an_error_of_the_engine_cancels_the_others(gather: Gather) -> None:
    cancelled = []

    class Breaks(ScriptedEngine):
        async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
            if token_ids == [101]:
                raise ConnectionError("the engine is gone")
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.append(token_ids)
                raise
            raise AssertionError

    with pytest.raises(ConnectionError, match="the engine is gone"):
        gather(Breaks(lambda token_ids, sampling: []))
    assert cancelled == [[100], [100], [102], [102]]


def made(group: int, reward: float, *, score: float = 0, unscored: str | None = None, logp: float = -1) -> Trajectory:
    sequence = Sequence([1, 2, 3], [False, True, True], [0, logp, logp], [0, 0, reward])
    return Trajectory(0, group, 0, [sequence], ["state", "action"], score, reward > 5, unscored)


def test_groups_without_signal_are_dropped() -> None:
    kept = [made(0, 1), made(0, 0), made(0, 0, unscored="late")]
    equal = [made(1, 1), made(1, 1), made(1, 0, unscored="late")]
    alone = [made(2, 1), made(2, 0, unscored="late")]
    nothing = [made(3, 0, unscored="late")]
    assert drop_equal_groups([*equal, *kept, *alone, *nothing]) == kept


def test_metrics() -> None:
    metrics = rollout_metrics(
        [made(0, 1, score=2), made(0, 6, score=3, logp=-2), made(1, 0, unscored="late", logp=-3)], "rollout"
    )
    assert metrics == pytest.approx(
        {
            "rollout/score": 2.5,
            "rollout/reward": 3.5,
            "rollout/length": 2,
            "rollout/entropy": 2,
            "rollout/truncated": 1 / 3,
            "rollout/turns": 1,
            "rollout/tokens": 6,
            "rollout/unscored": 1,
        }
    )


def test_what_has_no_mean_is_left_out() -> None:
    metrics = rollout_metrics([made(0, 0, unscored="late")], "test")
    assert not {"test/score", "test/reward"} & set(metrics)
    assert metrics["test/unscored"] == 1
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_rollout_without_any_reward_is_an_error() -> None:
    bad = [made(0, 0, unscored="late"), made(0, 0, unscored="late"), made(1, 0, unscored="OSError")]
    assert unscored_causes(bad) == {"late": 2, "OSError": 1}
    assert scored(bad) == []
    with pytest.raises(
        RuntimeError, match=r"none of the 3 trajectories has a reward[^\n]*\n  2 times: late\n  1 times"
    ):
        raise_if_all_unscored(bad)
    raise_if_all_unscored([*bad, made(1, 0)])
