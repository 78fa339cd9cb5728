"""The configuration of each program, and the rules that hold across groups of keys."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from RL2.config.data import SFTData, SupervisedData, TestData, TestSettings, TrainData
from RL2.config.model import Actor, Critic, DPOActor, RefActor, SFTActor, Trainable, TrainableChat
from RL2.config.rollout import Reward, Rollout, SamplingParams
from RL2.config.trainer import Advantage, RLTrainer, Trainer
from RL2.config.values import build
from RL2.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    train_data: TrainData
    test_data: TestData
    actor: Actor
    ref_actor: RefActor
    critic: Critic
    rollout: Rollout
    reward: Reward = field(default_factory=Reward)
    adv: Advantage
    trainer: RLTrainer

    @property
    def logprob_gap_limit(self) -> float:
        """`trainer.max_logprob_gap` where the engine and the trainer have the same distribution."""
        return math.inf if self.rollout.train_sampling_params.is_cut else self.trainer.max_logprob_gap

    @property
    def test_sets(self) -> list[TestSettings]:
        """Return the test sets: `test_data` itself, if it has rows or tasks, and those of `test_data.sets`."""
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
            )
            for name, each in data.sets.items()
        ]
        return [*([own] if data.has_own else []), *others]

    def __post_init__(self) -> None:
        actor, rollout = self.actor, self.rollout
        _check_schedule("actor", actor)
        _check_schedule("critic", self.critic)
        if rollout.model_name != actor.model_name:
            raise ConfigError(f"rollout.model_name={rollout.model_name!r} is not actor.model_name={actor.model_name!r}")
        if rollout.train_sampling_params.temperature == 0:
            raise ConfigError(
                "rollout.train_sampling_params.temperature=0 samples nothing to learn from; set it above 0"
            )
        if actor.temperature != rollout.train_sampling_params.temperature:
            raise ConfigError(
                f"actor.temperature={actor.temperature} is not rollout.train_sampling_params.temperature="
                f"{rollout.train_sampling_params.temperature}: it would train on a distribution it did not draw from"
            )
        if rollout.train_sampling_params.is_cut and actor.tis_coef > 0:
            raise ConfigError(
                f"actor.tis_coef={actor.tis_coef} compares with the engine's distribution, which top_p and top_k of "
                "rollout.train_sampling_params cut; set actor.tis_coef=0 or sample from all tokens"
            )
        sampled = {
            f"rollout.{name}": getattr(rollout, name) for name in ("train_sampling_params", "test_sampling_params")
        }
        of_sets = {f"{one.key}.sampling": one.sampling for one in self.test_sets if one.name}
        for key, sampling in of_sets.items():
            rollout.check_sampling(sampling, key)
        for key, sampling in (sampled | of_sets).items():
            if sampling.max_new_tokens > actor.max_length:
                raise ConfigError(
                    f"{key}.max_new_tokens={sampling.max_new_tokens} does not fit into "
                    f"actor.max_length_per_device={times_sp(actor.max_length_per_device, 'actor', actor.sp_size)}"
                )
        limits = [
            ("actor.max_inference_length_per_device", actor.max_inference_length_per_device, actor.sp_size),
            (
                "ref_actor.max_inference_length_per_device",
                self.ref_actor.max_inference_length_per_device,
                actor.sp_size,
            ),
        ]
        for key, tokens, sp_size in limits:
            check_limit(key, tokens, "actor", sp_size, actor)
        if self.adv.overlong_buffer > rollout.train_sampling_params.max_new_tokens:
            raise ConfigError(
                f"adv.overlong_buffer={self.adv.overlong_buffer} is more than "
                f"rollout.train_sampling_params.max_new_tokens={rollout.train_sampling_params.max_new_tokens}"
            )
        if self.adv.overlong_penalty != 1 and not self.adv.overlong_buffer:
            raise ConfigError("adv.overlong_penalty has no effect with adv.overlong_buffer=0")
        if actor.avg_level != "constant" and actor.avg_length != rollout.train_sampling_params.max_new_tokens:
            raise ConfigError(f"actor.avg_length has no effect with actor.avg_level={actor.avg_level}")
        if self.adv.overlong_buffer and rollout.max_turns > 1:
            raise ConfigError(
                f"adv.overlong_buffer={self.adv.overlong_buffer} is defined for one response; "
                f"set it to 0 or rollout.max_turns={rollout.max_turns} to 1"
            )
        _check_regularizers(actor)
        is_off_policy = actor.update_per_rollout > 1 or rollout.max_staleness > 0
        if not actor.kl.importance_weight and actor.kl.used_estimator == "k2" and not is_off_policy:
            raise ConfigError(
                "actor.kl.importance_weight=false has no effect with actor.update_per_rollout=1 and "
                "rollout.max_staleness=0: every weight is 1"
            )
        if actor.select.not_truncated and rollout.overlong_filtering:
            raise ConfigError(
                "actor.select.not_truncated=true has no effect with rollout.overlong_filtering=true, which leaves no "
                "truncated trajectory"
            )
        if actor.select.on_policy and not rollout.max_staleness:
            raise ConfigError("actor.select.on_policy has no effect with rollout.max_staleness=0: all tokens are")
        if rollout.dynamic_filtering and self.train_data.responses_per_prompt == 1:
            raise ConfigError(
                "rollout.dynamic_filtering=true drops every group of one (train_data.responses_per_prompt=1); "
                "set rollout.dynamic_filtering=false"
            )
        if rollout.dynamic_filtering_rounds > 1 and not rollout.dynamic_filtering and rollout.filter is None:
            raise ConfigError(
                f"rollout.dynamic_filtering_rounds={rollout.dynamic_filtering_rounds} has no effect with "
                "rollout.dynamic_filtering=false"
            )
        if self.trainer.test_freq and not self.test_sets:
            raise ConfigError(
                f"trainer.test_freq={self.trainer.test_freq} needs test_data.path, or test_data.prompts_per_rollout "
                "tasks that the environment makes up, or test_data.sets"
            )
        if self.trainer.eval_only and (source := self.trainer.load_ckpt_from) in ("latest", "best"):
            raise ConfigError(
                f"trainer.load_ckpt_from={source} is of trainer.save_dir, and trainer.eval_only=true writes into a new "
                "folder; name the checkpoint"
            )
        if self.trainer.eval_only and not self.test_sets:
            raise ConfigError(
                "trainer.eval_only=true needs test_data.path, test_data.prompts_per_rollout or test_data.sets"
            )
        for name in ("keep_best", "early_stop"):
            if getattr(self.trainer, name) and self.trainer.test_freq is None:
                raise ConfigError(f"trainer.{name}=true has no effect without trainer.test_freq")
        if self.train_data.path is None and self.train_data.curriculum != "none":
            raise ConfigError(
                f"train_data.curriculum={self.train_data.curriculum} needs train_data.path: tasks that the environment "
                "makes up never come back"
            )


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    data: SFTData
    actor: SFTActor
    trainer: Trainer

    def __post_init__(self) -> None:
        self.data.check(self.trainer.test_freq)
        _check_schedule("actor", self.actor)


@dataclass(frozen=True, kw_only=True)
class RMConfig:
    data: SupervisedData
    critic: TrainableChat
    trainer: Trainer

    def __post_init__(self) -> None:
        self.data.check(self.trainer.test_freq)
        _check_schedule("critic", self.critic)


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    data: SupervisedData
    actor: DPOActor
    ref_actor: RefActor
    trainer: Trainer

    def __post_init__(self) -> None:
        self.data.check(self.trainer.test_freq)
        _check_schedule("actor", self.actor)
        if self.actor.reference_free and self.ref_actor.model_name != self.actor.model_name:
            raise ConfigError("ref_actor.model_name has no effect with actor.reference_free=true")


def _changed(sampling: SamplingParams, changes: dict[str, Any], key: str) -> SamplingParams:
    """Return `sampling` with `changes`, which are the settings of the group `key`."""
    values = asdict(sampling) | changes
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    changed: SamplingParams = build(SamplingParams, values, key)
    return changed


def _check_regularizers(actor: Actor) -> None:
    if actor.regularize_on == "all" and not (actor.entropy.coef or (actor.kl.coef and actor.kl.type == "loss")):
        raise ConfigError(
            "actor.regularize_on=all has no effect with actor.entropy.coef=0 and no KL divergence in the loss"
        )
    if actor.regularize_on == "all" and actor.train_on == "all" and not actor.select.is_on:
        raise ConfigError("actor.regularize_on=all has no effect: actor.train_on=all and actor.select keep everything")


def times_sp(tokens: int, group: str, sp_size: int) -> str:
    """A limit of one process, and how many share a microbatch."""
    return f"{tokens}" + (f" x {group}.sp_size={sp_size}" if sp_size > 1 else "")


def check_limit(key: str, tokens: int, group: str, sp_size: int, actor: Actor) -> None:
    """Raise ConfigError unless the longest sequence of `actor` fits into `tokens` on each of `sp_size` processes.

    `key` is the limit of a model of `group`.
    """
    if tokens * sp_size < actor.max_length:
        raise ConfigError(
            f"{key}={times_sp(tokens, group, sp_size)} is less than actor.max_length_per_device="
            f"{times_sp(actor.max_length_per_device, 'actor', actor.sp_size)}, so a sequence may not fit"
        )


def _check_schedule(group: str, model: Trainable) -> None:
    """Here and not in `Trainable`, which does not know the name of its group."""
    if model.scheduler == "wsd" and model.used_warmup_ratio + model.decay_ratio > 1:
        raise ConfigError(
            f"{group}.warmup_ratio={model.used_warmup_ratio} and {group}.decay_ratio={model.decay_ratio} overlap; "
            "together they must be at most 1"
        )


Config = RLConfig | SFTConfig | RMConfig | DPOConfig

PROGRAMS: dict[str, type] = {
    "sft": SFTConfig,
    "rm": RMConfig,
    "dpo": DPOConfig,
    "ppo": RLConfig,
    "spo": RLConfig,
    "spo_0p5": RLConfig,
    "path": RLConfig,
}

"""Program -> its configuration; `trainer/config/PROGRAM.yaml` holds the defaults."""


def trained(config: Config) -> tuple[str, TrainableChat]:
    """The model that a program trains, after the name of its group of keys."""
    return ("critic", config.critic) if isinstance(config, RMConfig) else ("actor", config.actor)
