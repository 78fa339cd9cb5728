"""ReMax: advantages relative to a greedy response, and where its reward comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rl_settings import rl_config

from RL2.batch.advantages import remax
from RL2.batch.packing import pack
from RL2.errors import ConfigError
from RL2.io.progress import Progress
from RL2.rollout.metrics import NothingScored
from RL2.trainer.estimator_rules import check_estimator
from RL2.trainer.rl import with_greedy_rewards
from RL2.types import Sequence, Trajectory


def response(row: int, group: int, sample: int, reward: float) -> Trajectory:
    return Trajectory(row, group, sample, [Sequence([1, 2, 3], [False, True, True], [0.0] * 3, [0.0, 0.0, reward])])


def test_the_advantage_is_the_lead_over_the_greedy_response() -> None:
    rewards, greedy = [1.0, 0.0, 0.5, -2.0], [0.25, 0.25, 1.0, 1.0]
    batch = pack([response(n // 2, n // 2, n % 2, reward) for n, reward in enumerate(rewards)])
    advantage_T = remax(batch, greedy_N=torch.tensor(greedy, dtype=torch.float64))
    expected = [reward - baseline for reward, baseline in zip(rewards, greedy, strict=True) for _ in range(2)]
    assert advantage_T.tolist() == expected


@dataclass
class Player:
    """An engine's place: it plays one greedy episode of each prompt, which earns a tenth of its row."""

    asked: list[Any] = field(default_factory=list)
    fails: tuple[int, ...] = ()

    def play(self, prompts: Any, sampling: Any, number: int, seed: int, progress: Any) -> list[Trajectory]:
        self.asked.append((prompts, sampling.temperature, sampling.max_new_tokens, number))
        played = [response(row, place, 0, row / 10) for place, row in enumerate(prompts)]
        for one in played:
            one.unscored = "no grader" if one.row in self.fails else None
        return played


def test_each_prompt_is_played_once_greedily() -> None:
    player = Player()
    parts: Any = SimpleNamespace(
        scheduler=SimpleNamespace(prompts=range(100), places=range(100), episodes=player),
        report=SimpleNamespace(progress=Progress(speaks=False)),
    )
    trajectories = [response(row, group, sample, 1.0) for group, row in enumerate((7, 3, 7)) for sample in range(2)]
    config = rl_config("adv.estimator=remax")
    told, metrics = with_greedy_rewards(trajectories, parts, config, 5)
    assert player.asked == [([3, 7], 0.0, 4, 1)]
    assert [trajectory.greedy_reward for trajectory in told] == [0.7, 0.7, 0.3, 0.3, 0.7, 0.7]
    assert metrics == {
        "train/greedy_reward": pytest.approx(0.5),
        "train/greedy_tokens": 4,
        "train/greedy_unscored": 0,
    }
    player.fails = (7,)
    told, metrics = with_greedy_rewards(trajectories, parts, config, 5)
    assert [trajectory.row for trajectory in told] == [3, 3] and metrics["train/greedy_unscored"] == 0.5
    player.fails = (3, 7)
    with pytest.raises(NothingScored, match=r"each greedy response of adv.estimator=remax is unscored, the first: no"):
        with_greedy_rewards(trajectories, parts, config, 5)


def test_rollouts_of_other_weights_are_refused() -> None:
    for setting, why in (
        ("rollout.max_staleness=1", "a greedy response of the same weights"),
        ("rollout.agent=x.py:play", "does not work with rollout.agent"),
    ):
        changes = ("rollout.env_path=null",) if "agent" in setting else ()
        with pytest.raises(ConfigError, match=why):
            check_estimator(rl_config("adv.estimator=remax", setting, *changes))
    check_estimator(rl_config("adv.estimator=remax", "train_data.responses_per_prompt=1"))
