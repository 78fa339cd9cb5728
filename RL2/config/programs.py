"""The configuration of each program; the rules that its groups of keys keep are in rules.py."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from RL2.config.data import SFTData, SupervisedData, TestData, TestSettings, TrainData
from RL2.config.model import (
    Actor,
    Critic,
    DPOActor,
    MovingRefActor,
    RefActor,
    RewardModel,
    SFTActor,
    Teacher,
    TrainableChat,
)
from RL2.config.rollout import Reward, Rollout, SamplingParams, without_policy
from RL2.config.rules import DPO_RULES, RL_RULES, RM_RULES, SFT_RULES, check
from RL2.config.trainer import Advantage, RLTrainer, Trainer
from RL2.config.values import build


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Reinforcement learning: ppo, spo and their variants; and on-policy distillation."""

    train_data: TrainData
    test_data: TestData
    actor: Actor
    ref_actor: MovingRefActor
    teacher: Teacher = field(default_factory=Teacher)
    critic: Critic
    rollout: Rollout
    reward: Reward = field(default_factory=Reward)
    adv: Advantage
    trainer: RLTrainer

    @property
    def logprob_gap_limit(self) -> float:
        """Limit of the log-probability gap; infinite where the engine samples from a cut distribution."""
        return math.inf if self.rollout.train_sampling_params.is_cut else self.trainer.max_logprob_gap

    @property
    def test_sets(self) -> list[TestSettings]:
        """Test sets: `test_data` itself, if it has rows or tasks, and those of `test_data.sets`."""
        data, rollout = self.test_data, self.rollout
        own = TestSettings(
            name="",
            path=data.path,
            env_path=rollout.env_path,
            prompts_per_rollout=data.prompts_per_rollout,
            responses_per_prompt=data.responses_per_prompt,
            max_turns=rollout.max_turns,
            on_bad_row=data.on_bad_row,
            columns=self.train_data.columns | data.columns,
            sampling=rollout.test_sampling_params,
            opponents=without_policy(rollout.opponents | data.opponents),
        )
        others = [
            TestSettings(
                name=name,
                path=each.path,
                env_path=each.env_path or own.env_path,
                prompts_per_rollout=each.prompts_per_rollout,
                responses_per_prompt=each.responses_per_prompt or own.responses_per_prompt,
                max_turns=each.max_turns or own.max_turns,
                on_bad_row=each.on_bad_row or own.on_bad_row,
                columns=own.columns | each.columns,
                sampling=_changed(own.sampling, each.sampling, f"test_data.sets.{name}.sampling"),
                opponents=without_policy(rollout.opponents | data.opponents | each.opponents),
            )
            for name, each in data.sets.items()
        ]
        return [*([own] if data.has_own else []), *others]

    def __post_init__(self) -> None:
        check(self, RL_RULES)


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning."""

    data: SFTData
    actor: SFTActor
    teacher: Teacher = field(default_factory=Teacher)
    trainer: Trainer

    def __post_init__(self) -> None:
        check(self, SFT_RULES)


@dataclass(frozen=True, kw_only=True)
class RMConfig:
    """A reward model."""

    data: SupervisedData
    critic: RewardModel
    trainer: Trainer

    def __post_init__(self) -> None:
        check(self, RM_RULES)


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimisation."""

    data: SupervisedData
    actor: DPOActor
    ref_actor: RefActor
    trainer: Trainer

    def __post_init__(self) -> None:
        check(self, DPO_RULES)


def _changed(sampling: SamplingParams, changes: dict[str, Any], key: str) -> SamplingParams:
    """Return `sampling` with the settings `changes` of the group `key`."""
    values = asdict(sampling) | changes
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    changed: SamplingParams = build(SamplingParams, values, key)
    return changed


Config = RLConfig | SFTConfig | RMConfig | DPOConfig

PROGRAMS: dict[str, type] = {
    "sft": SFTConfig,
    "rm": RMConfig,
    "dpo": DPOConfig,
    "ppo": RLConfig,
    "spo": RLConfig,
    "spo_0p5": RLConfig,
    "path": RLConfig,
    "distill": RLConfig,
}
"""Class of each program's configuration; `trainer/config/PROGRAM.yaml` has what differs from its defaults."""


def trained(config: Config) -> tuple[str, TrainableChat]:
    """Return the model that a program trains, after the name of its group of keys."""
    return ("critic", config.critic) if isinstance(config, RMConfig) else ("actor", config.actor)
