"""A reward may be a dict of parts: they add up with their weights, have curves, and are checked one by one."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from episodes import one_episode
from rl_settings import rl_config
from transformers import PreTrainedTokenizerBase

from RL2.batch.packing import pack, part_rewards
from RL2.config.rollout import Reward
from RL2.engines.scripted import ScriptedEngine
from RL2.errors import ConfigError
from RL2.io.report import Report
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.filters import success_rates
from RL2.rollout.metrics import rollout_metrics
from RL2.rollout.step_result import Unscored
from RL2.trainer.alarms import Alarms
from RL2.trainer.evaluator import warn_of_metrics
from RL2.types import Prompt, Sampling, Trajectory

SCRIPT = """
async def step(state, action, extra_info):
    turn = extra_info["turn"] = extra_info.get("turn", -1) + 1
    rewards = extra_info["rewards"]
    done = turn == len(rewards) - 1
    return {"next_state": state + action + ".", "reward": eval(rewards[turn]), "score": done, "done": done,
            "extra_info": extra_info, "metrics": eval(extra_info["metrics"][turn]) if "metrics" in extra_info else None}
"""

Play = Callable[..., Trajectory]


@pytest.fixture
def play(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Play]:
    """An episode whose turns earn the rewards that are given as Python."""
    (tmp_path / "env.py").write_text(SCRIPT)
    environments: list[Environment] = []

    def play(*rewards: str, weights: dict[str, float] | None = None, **more: Any) -> Trajectory:
        environments.append(load_environment(tmp_path / "env.py", 5, weights))
        return one_episode(
            Prompt(0, "hello", tokenizer.encode("hello"), {"rewards": list(rewards)} | more),
            engine=ScriptedEngine(lambda token_ids, sampling: [40, 41]),
            environment=environments[-1],
            tokenizer=tokenizer,
            sampling=Sampling(max_new_tokens=8),
            max_turns=9,
        )

    yield play
    for environment in environments:
        environment.close()


AWKWARD = (0.1, 1 / 3, 0.7, -0.3, 1e-9, 1e5, 123.456, -2.5)


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_parts_add_up_exactly(play: Play, turns: int) -> None:
    """The reward is the sum of weight times part, rounded once, however many turns and parts there are."""
    for shift in range(len(AWKWARD)):
        values = AWKWARD[shift:] + AWKWARD[:shift]
        weights = dict(zip("abc", values, strict=False))
        rewards = [{name: values[(3 * turn + n) % 8] for n, name in enumerate("abcd")} for turn in range(turns)]
        found = play(*map(repr, rewards), weights=weights)
        assert found.parts == {name: math.fsum(reward[name] for reward in rewards) for name in "abcd"}
        expected = math.fsum(weights.get(name, 1.0) * value for name, value in found.parts.items())
        assert found.reward == expected
        by_token = math.fsum(reward for sequence in found.sequences for reward in sequence.rewards.tolist())
        assert by_token == pytest.approx(expected, rel=1e-12)
        assert float(pack([found]).reward_T.double().sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("turns", [["{'a': 0.6, 'b': 0.3, 'c': -0.9}"], ["{'a': 0.6, 'b': 0.3}", "{'c': -0.9}"]])
def test_parts_that_cancel_are_not_correct(play: Play, turns: list[str]) -> None:
    found = play(*turns)
    assert found.reward == 0
    assert success_rates([found]) == {0: 0}


@pytest.mark.parametrize("turns", [["0.5", "{'a': 1}"], ["{'a': 1}", "0.5"], ["-1", "{'a': 1}"], ["2", "{'a': -1}"]])
def test_turns_with_a_number_count_beside_turns_with_parts(play: Play, turns: list[str]) -> None:
    """The reward is that of the tokens, for every estimator and metric."""
    found = play(*turns, weights={"a": 2})
    by_token = sum(sum(sequence.rewards.tolist()) for sequence in found.sequences)
    assert found.reward == by_token
    part_NP, weight_P = part_rewards([found], {"a": 2})
    assert float((part_NP * weight_P).sum()) == by_token
    assert found.parts.keys() == {"a"}


def test_a_part_that_cancels_over_the_turns_is_0(play: Play) -> None:
    """Rounding is no signal, not even for an estimator that divides by its deviation."""
    assert play("{'a': 0.1}", "{'a': 0.2}", "{'a': -0.3, 'b': 1}").parts == {"a": 0, "b": 1}


def test_a_weight_decides_what_is_correct(play: Play) -> None:
    reward = "{'correct': False, 'format': True}"
    assert success_rates([play(reward)]) == {0: 1}
    assert success_rates([play(reward, weights={"format": 0})]) == {0: 0}
    assert play(reward, weights={"format": -2}).reward == -2


def test_the_reward_stands_at_the_last_token_of_the_turn(play: Play) -> None:
    (sequence,) = play("{'a': 1, 'b': 0.5}", "2", weights={"b": 4}).sequences
    assert [reward for reward in sequence.rewards.tolist() if reward] == [3, 2]
    assert sequence.rewards[-1] == 2


def test_a_bool_is_0_or_1(play: Play) -> None:
    assert (play("True").reward, play("False").reward) == (1, 0)
    assert play("__import__('numpy').bool_(True)").reward == 1
    assert play("True").score == 1


@pytest.mark.parametrize(
    ("reward", "cause"),
    [
        ("{}", "step returned reward={}; expected a number, or a dict with one part at least"),
        ("{'a': None}", "step returned reward['a']=None; expected a number or a bool"),
        ("{'a': 1, 'b': '1'}", "step returned reward['b']=a str; expected a number or a bool"),
        ("{'a': {'b': 1}}", "step returned reward['a']=a dict; expected a number or a bool"),
        ("{'a': float('nan')}", "step returned reward['a']=nan; expected a finite number"),
        ("{'a': 1, 'b': 1e16}", "step returned reward['b']=1e+16; expected a number of at most 1e+15 in size"),
        ("{'heavy': 1e12}", "step returned reward['heavy']=1000000000000.0, with its weight 1e+16; expected at most"),
        ("{'a/b': 1}", "step returned a part of the reward named 'a/b'; a name has letters, digits, _ and -"),
        ("{1: 1}", "step returned a part of the reward named 1;"),
        ("{'': 1}", "step returned a part of the reward named '';"),
    ],
)
def test_a_part_without_a_value_is_no_reward(play: Play, reward: str, cause: str) -> None:
    """Unscored is never 0, for none of the parts."""
    found = play("{'a': 1}", reward, weights={"heavy": 1e4})
    assert found.unscored is not None
    assert found.unscored.startswith(cause)
    assert (found.parts, found.reward, found.score) == ({}, 0, 0)


def test_each_part_has_its_curve(play: Play, tmp_path: Path) -> None:
    """The mean over the scored trajectories that have it: other rows may have other parts."""
    rewards = ("{'a': 1, 'b': 0.5}", "{'a': 0}", "{'b': float('inf')}", "2")
    trajectories = [play(reward, weights={"b": 2}) for reward in rewards]
    metrics = rollout_metrics(trajectories, "train")
    assert {name: value for name, value in metrics.items() if "reward" in name} == {
        "train/reward": pytest.approx(4 / 3),
        "train/reward/a": 0.5,
        "train/reward/b": 0.5,
    }
    Report(tmp_path, is_first=True, num_steps=1).samples(0, "train", trajectories)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample.get("parts") for sample in samples] == [{"a": 1, "b": 0.5}, {"a": 0}, None, None]


def test_weights_are_settings() -> None:
    assert rl_config().reward.weights == {}
    weighed = rl_config("reward.weights.format=0.1", "reward.weights.length=-1")
    assert weighed.reward.weights == {"format": 0.1, "length": -1}
    with pytest.raises(ConfigError, match=r"reward\.weights\.a/b: no part of a reward has this name"):
        Reward(weights={"a/b": 1})


@pytest.mark.parametrize("value", [True, "much", math.nan, math.inf, None, 1e7, [1], 10**400, {"a": 1}])
def test_what_is_no_weight_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"reward\.weights\.format=.*expected a number of at most 1e\+06 in size"):
        Reward(weights={"format": value})


def test_a_weight_of_no_part_is_said_once() -> None:
    watch = Alarms(1, "x", weights=["format", "corect"])
    said = watch.see(0, {"train/reward": 1.0, "train/reward/correct": 1.0, "train/reward/format": 1.0})
    assert said == [
        "step 0: WARNING: reward.weights.corect weighs no part of any reward so far; parts are correct, format"
    ]
    assert watch.see(1, {"train/reward/correct": 1.0}) == []
    (without,) = Alarms(1, "x", weights=["a"]).see(0, {"train/reward": 1.0})
    assert "it has no parts: `step` returns a number" in without


def test_an_environment_alone_weighs_too(tmp_path: Path) -> None:
    (tmp_path / "env.py").write_text(SCRIPT)
    environment = load_environment(tmp_path / "env.py", 5, {"b": 3})
    info: dict[str, Any] = {"rewards": ["{'a': True, 'b': 2}", "{'b': 'x'}"]}
    result = asyncio.run(environment.step("s", "a", info))
    assert (result.reward, result.parts) == (7, {"a": 1, "b": 2})
    with pytest.raises(Unscored):
        asyncio.run(environment.step("s", "a", result.extra_info))
    environment.close()


def test_metrics_of_the_environment_have_curves(play: Play, tmp_path: Path) -> None:
    """The mean over turns, then over the trajectories that have it, scored or not."""
    trajectories = [
        play("0", "1", metrics=["{'tests': 3, 'compiles': False}", "{'tests': 5, 'compiles': True}"]),
        play("0", "1", metrics=["None", "{'tests': 10}"]),
        play("0", "None", metrics=["{'compiles': True}", "{}"]),
        play("1"),
    ]
    metrics = rollout_metrics(trajectories, "test")
    assert {name: value for name, value in metrics.items() if "/env/" in name} == {
        "test/env/compiles": 0.75,
        "test/env/tests": 7,
    }
    Report(tmp_path, is_first=True, num_steps=1).samples(0, "test", trajectories)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample.get("metrics") for sample in samples] == [
        {"tests": 4, "compiles": 0.5},
        {"tests": 10},
        {"compiles": 1},
        None,
    ]


@pytest.mark.parametrize(
    ("metrics", "why"),
    [
        ("{'bad': float('nan'), 'good': 1}", "metrics['bad']=nan; expected a finite number"),
        ("{'bad': 'much', 'good': 1}", "metrics['bad']=a str; expected a number or a bool"),
        ("{'bad': 10**400, 'good': 1}", "metrics['bad']=inf; expected a finite number"),
        ("{'a/b': 1, 'good': 1}", "a metric named 'a/b'; a name has letters, digits, _ and -"),
        ("[1]", "a list; expected a dict"),
    ],
)
def test_a_metric_that_is_no_number_costs_no_trajectory(
    metrics: str, why: str, play: Play, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = play("0.5", "1", metrics=[metrics, "{'good': 3}"])
    assert (found.unscored, found.reward) == (None, 1.5)
    assert found.metrics == {"good": 3 if metrics == "[1]" else 2}
    report = Report(tmp_path, is_first=True, num_steps=1)
    for step in range(2):
        warn_of_metrics([found, found], step, report)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 0: WARNING: a metric of the environment is left out: ")
    assert why in line
