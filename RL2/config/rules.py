"""Rules across groups of keys: one function for each combination of settings that cannot work or has no effect.

Rules that depend on the advantage estimator are in trainer/estimator_rules.py.

A rule is named after what it forbids, takes the groups of keys that it compares, and raises `ConfigError`. To find the
rules for a key, search this file for the key; rules within one group are in the `__post_init__` of its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from RL2.config.data import SupervisedData, TestSettings, TrainData
from RL2.config.model import Actor, DPOActor, MovingRefActor, RefActor, Teacher, Trainable, times_sp
from RL2.config.rollout import Rollout
from RL2.config.trainer import Advantage, RLTrainer, Trainer
from RL2.config.values import LATEST
from RL2.errors import ConfigError

Rule = Callable[..., None]
"""A rule; the names of its parameters are attributes of the configuration."""


def check(config: object, rules: tuple[Rule, ...]) -> None:
    """Raise ConfigError if `config` breaks one of the rules; each gets the groups that its parameters name."""
    for rule in rules:
        rule(**{group: getattr(config, group) for group in inspect.signature(rule).parameters})


# models


def overlapping_phases_of_the_actors_schedule(actor: Trainable) -> None:
    """Refuse actor.warmup_ratio and actor.decay_ratio of more than 1 together."""
    _overlapping_phases("actor", actor)


def overlapping_phases_of_the_critics_schedule(critic: Trainable) -> None:
    """Refuse critic.warmup_ratio and critic.decay_ratio of more than 1 together."""
    _overlapping_phases("critic", critic)


def floor_of_the_actors_rate(actor: Trainable) -> None:
    """Refuse actor.min_lr that nothing decays to, or that is above actor.lr."""
    _floor_of_the_rate("actor", actor)


def floor_of_the_critics_rate(critic: Trainable) -> None:
    """Refuse critic.min_lr that nothing decays to, or that is above critic.lr."""
    _floor_of_the_rate("critic", critic)


def _floor_of_the_rate(group: str, model: Trainable) -> None:
    if model.min_lr and model.scheduler == "constant":
        raise ConfigError(f"{group}.min_lr={model.min_lr:g} has no effect with {group}.scheduler=constant")
    if model.min_lr > model.lr:
        raise ConfigError(f"{group}.min_lr={model.min_lr:g} is above {group}.lr={model.lr:g}")


def _overlapping_phases(group: str, model: Trainable) -> None:
    if model.scheduler == "wsd" and model.used_warmup_ratio + model.decay_ratio > 1:
        raise ConfigError(
            f"{group}.warmup_ratio={model.used_warmup_ratio} and {group}.decay_ratio={model.decay_ratio} overlap; "
            "together they must be at most 1"
        )


def reference_that_cannot_follow(actor: Actor, ref_actor: MovingRefActor, trainer: RLTrainer) -> None:
    """Refuse ref_actor.sync_every with another model, with adapters, or with checkpoints between two refreshes."""
    every = ref_actor.sync_every
    if every is None:
        return
    if ref_actor.model_name != actor.model_name:
        raise ConfigError(
            f"ref_actor.sync_every={every} needs ref_actor.model_name to be actor.model_name={actor.model_name!r}, and "
            f"it is {ref_actor.model_name!r}"
        )
    if actor.lora.rank:
        raise ConfigError(
            f"ref_actor.sync_every={every} needs actor.lora.rank=0, and it is {actor.lora.rank}: the reference is the "
            "model without its adapters"
        )
    if trainer.save_freq is not None and trainer.save_freq % every:
        raise ConfigError(
            f"trainer.save_freq={trainer.save_freq} is no multiple of ref_actor.sync_every={every}: a run that resumes "
            "in between would not have its reference"
        )


def engine_with_another_model(actor: Actor, rollout: Rollout) -> None:
    """Refuse a rollout.model_name other than actor.model_name."""
    if rollout.model_name != actor.model_name:
        raise ConfigError(f"rollout.model_name={rollout.model_name!r} is not actor.model_name={actor.model_name!r}")


def avg_length_without_a_constant_denominator(actor: Actor, rollout: Rollout) -> None:
    """Refuse actor.avg_length unless actor.avg_level=constant reads it."""
    if actor.avg_level != "constant" and actor.avg_length != rollout.train_sampling_params.max_new_tokens:
        raise ConfigError(f"actor.avg_length has no effect with actor.avg_level={actor.avg_level}")


def regularize_on_without_a_regularizer(actor: Actor) -> None:
    """Refuse actor.regularize_on=all without actor.entropy.coef and without actor.kl.coef in the loss."""
    if actor.regularize_on == "all" and not (actor.entropy.is_on or (actor.kl.coef and actor.kl.type == "loss")):
        raise ConfigError(
            "actor.regularize_on=all has no effect with actor.entropy.coef=0 and no KL divergence in the loss"
        )


def kept_steps_without_their_entropy_coefficient(actor: Actor, trainer: RLTrainer) -> None:
    """Refuse trainer.replay_freq with actor.entropy.target."""
    if actor.entropy.target is not None and trainer.replay_freq is not None:
        raise ConfigError(
            f"trainer.replay_freq={trainer.replay_freq} with actor.entropy.target={actor.entropy.target:g}: a kept "
            "step does not hold the coefficient that the entropy had; leave one of them out"
        )


def observations_of_a_single_turn(actor: Actor, rollout: Rollout) -> None:
    """Refuse actor.observations.coef without a second turn."""
    if actor.observations.coef and rollout.max_turns == 1:
        raise ConfigError(
            f"actor.observations.coef={actor.observations.coef:g} has no effect with rollout.max_turns=1: nothing is "
            "observed before another response"
        )


def regularize_on_where_all_tokens_train(actor: Actor) -> None:
    """Refuse actor.regularize_on=all where actor.train_on and actor.select keep every token."""
    if actor.regularize_on == "all" and actor.train_on == "all" and not actor.select.is_on:
        raise ConfigError("actor.regularize_on=all has no effect: actor.train_on=all and actor.select keep everything")


def kl_without_importance_weight_on_policy(actor: Actor, rollout: Rollout) -> None:
    """Refuse actor.kl.importance_weight=false where every importance weight is 1."""
    is_off_policy = actor.update_per_rollout > 1 or rollout.max_staleness > 0
    if not actor.kl.importance_weight and actor.kl.used_estimator == "k2" and not is_off_policy:
        raise ConfigError(
            "actor.kl.importance_weight=false has no effect with actor.update_per_rollout=1 and "
            "rollout.max_staleness=0: every weight is 1"
        )


def hints_that_nobody_gives(actor: Actor, rollout: Rollout, train_data: TrainData, teacher: Teacher) -> None:
    """Refuse teacher.hint without rows and an environment, with an agent, and with observations that train."""
    if not teacher.hint:
        return
    if rollout.env_path is None or rollout.agent is not None or train_data.path is None:
        raise ConfigError(
            "teacher.hint=true reads `hint(extra_info)` of the environment's script for each row; set rollout.env_path "
            "and train_data.path, and no rollout.agent"
        )
    if actor.observations.coef:
        raise ConfigError("teacher.hint=true needs actor.observations.coef=0: the teacher reads responses only")


def exact_kl_beside_a_teacher(actor: Actor, teacher: Teacher) -> None:
    """Refuse actor.kl.estimator=exact with a teacher."""
    if actor.kl.is_exact and teacher.is_on:
        raise ConfigError(
            "actor.kl.estimator=exact with a teacher: an update compares the policy with one other distribution; set "
            "actor.kl.estimator=k2"
        )


def teachers_without_rows(rollout: Rollout, train_data: TrainData, teacher: Teacher) -> None:
    """Refuse teacher.models without rows, which name their teachers."""
    if teacher.models and (train_data.path is None or rollout.agent is not None):
        raise ConfigError("teacher.models needs train_data.path, whose rows name a teacher each, and no rollout.agent")


def experts_of_an_engine_that_records_none(actor: Actor, rollout: Rollout) -> None:
    """Refuse actor.moe.replay=engine or compare unless rollout.engine=embedded."""
    if actor.moe.reads_engine and rollout.servers is not None:
        raise ConfigError(
            f"actor.moe.replay={actor.moe.replay} needs rollout.engine=embedded, and it is {rollout.engine}: only that "
            "engine records the experts of each token"
        )


def adapters_alone(actor: Actor, rollout: Rollout) -> None:
    """Refuse rollout.vllm.lora=adapter without adapters, with adapters on experts, or without files as transport."""
    if rollout.engine != "vllm" or rollout.vllm.lora == "merged":
        return
    if not actor.lora.rank:
        raise ConfigError("rollout.vllm.lora=adapter has no effect with actor.lora.rank=0")
    if actor.lora.experts:
        raise ConfigError(
            f"rollout.vllm.lora=adapter: actor.lora.target_modules has {', '.join(actor.lora.experts)}, and servers "
            "add adapters only to linear layers; use rollout.vllm.lora=merged"
        )
    if rollout.vllm.transport != "files":
        raise ConfigError(
            f"rollout.vllm.lora=adapter needs rollout.vllm.transport=files, and it is {rollout.vllm.transport}"
        )


def selection_of_trajectories_that_are_filtered(actor: Actor, rollout: Rollout) -> None:
    """Refuse actor.select.not_truncated=true together with rollout.overlong_filtering=true."""
    if actor.select.not_truncated and rollout.overlong_filtering:
        raise ConfigError(
            "actor.select.not_truncated=true has no effect with rollout.overlong_filtering=true, which leaves no "
            "truncated trajectory"
        )


def selection_of_on_policy_tokens_where_all_are(actor: Actor, rollout: Rollout) -> None:
    """Refuse actor.select.on_policy with rollout.max_staleness=0."""
    if actor.select.on_policy and not rollout.max_staleness:
        raise ConfigError("actor.select.on_policy has no effect with rollout.max_staleness=0: all tokens are")


def opponents_that_cannot_play(
    actor: Actor, rollout: Rollout, trainer: RLTrainer, test_sets: list[TestSettings]
) -> None:
    """Refuse opponents beside servers, and `latest` without checkpoints or with only one that is kept."""
    for key, opponents in {"rollout": rollout.opponents, **{each.key: each.opponents for each in test_sets}}.items():
        if opponents and rollout.servers is not None:
            raise ConfigError(
                f"{key}.opponents needs rollout.engine=embedded, and it is {rollout.engine}: frozen models beside "
                "servers were not tried"
            )
        for role, name in opponents.items():
            if name == LATEST and trainer.save_freq is None:
                raise ConfigError(f"{key}.opponents.{role}=latest needs trainer.save_freq: it is the last checkpoint")
            if name == LATEST and trainer.keep == 1:
                raise ConfigError(
                    f"{key}.opponents.{role}=latest needs trainer.keep of at least 2: a run that was interrupted goes "
                    "on with the checkpoint before"
                )


def missing_environment(rollout: Rollout, actor: Actor, teacher: Teacher, test_sets: list[TestSettings]) -> None:
    """Refuse a run without rollout.env_path and rollout.agent, unless a teacher is all that it learns from."""
    if rollout.env_path is not None or rollout.agent is not None:
        return
    if not teacher.is_on:
        raise ConfigError("rollout.env_path is not set; pass rollout.env_path=...")
    needs = {"actor.train_on=correct": actor.train_on == "correct", "rollout.filter": rollout.filter is not None}
    needs["rollout.dynamic_filtering=true"] = rollout.dynamic_filtering
    needs["rollout.max_turns above 1"] = rollout.max_turns > 1
    needs |= {f"{each.key} (a test)": True for each in test_sets if each.env_path is None}
    if found := [key for key, is_on in needs.items() if is_on]:
        raise ConfigError(f"{found[0]} needs rollout.env_path, and it is not set; pass rollout.env_path=...")


# sampling


def greedy_training_samples(rollout: Rollout) -> None:
    """Refuse rollout.train_sampling_params.temperature=0."""
    if rollout.train_sampling_params.temperature == 0:
        raise ConfigError("rollout.train_sampling_params.temperature=0 samples nothing to learn from; set it above 0")


def training_at_another_temperature(actor: Actor, rollout: Rollout) -> None:
    """Refuse an actor.temperature other than rollout.train_sampling_params.temperature."""
    if actor.temperature != rollout.train_sampling_params.temperature:
        raise ConfigError(
            f"actor.temperature={actor.temperature} is not rollout.train_sampling_params.temperature="
            f"{rollout.train_sampling_params.temperature}: training and sampling would differ"
        )


def importance_weights_of_a_cut_distribution(actor: Actor, rollout: Rollout) -> None:
    """Refuse comparisons with the engine where rollout.train_sampling_params exclude tokens."""
    used = {
        f"actor.tis_coef={actor.tis_coef}": actor.tis_coef > 0,
        "actor.masks": actor.masks.is_on,
        "actor.select.second_moment": actor.select.second_moment is not None,
    }
    if rollout.train_sampling_params.is_cut and any(used.values()):
        setting = next(key for key, is_on in used.items() if is_on)
        raise ConfigError(
            f"{setting} compares with the engine's distribution, which top_p, top_k or min_p of "
            f"rollout.train_sampling_params cut; {'set actor.tis_coef=0' if actor.tis_coef else 'unset it'} or sample "
            "from all tokens"
        )


def sampling_that_the_engine_lacks(rollout: Rollout, test_sets: list[TestSettings]) -> None:
    """Refuse test_data.sets.NAME.sampling if rollout.engine does not support it."""
    for each in test_sets:
        if each.name:
            rollout.check_sampling(each.sampling, f"{each.key}.sampling")


def response_longer_than_a_microbatch(actor: Actor, rollout: Rollout, test_sets: list[TestSettings]) -> None:
    """Refuse a max_new_tokens, in training or tests, that exceeds actor.max_length_per_device * actor.sp_size."""
    sampling = {
        "rollout.train_sampling_params": rollout.train_sampling_params,
        "rollout.test_sampling_params": rollout.test_sampling_params,
    } | {f"{each.key}.sampling": each.sampling for each in test_sets if each.name}
    for key, params in sampling.items():
        if params.max_new_tokens > actor.max_length:
            raise ConfigError(
                f"{key}.max_new_tokens={params.max_new_tokens} does not fit into "
                f"actor.max_length_per_device={times_sp(actor.max_length_per_device, 'actor', actor.sp_size)}"
            )


def sequence_longer_than_another_microbatch(actor: Actor, ref_actor: RefActor) -> None:
    """Refuse an actor.max_length_per_device that exceeds max_inference_length_per_device of actor or ref_actor."""
    key = "max_inference_length_per_device"
    check_limit(f"actor.{key}", actor.max_inference_length_per_device, "actor", actor.sp_size, actor)
    check_limit(f"ref_actor.{key}", ref_actor.max_inference_length_per_device, "actor", actor.sp_size, actor)


def check_limit(key: str, tokens: int, group: str, sp_size: int, actor: Actor) -> None:
    """Raise ConfigError unless the longest sequence of `actor` fits into `tokens` on each of `sp_size` processes.

    `key` is the limit of a model of `group`.
    """
    if tokens * sp_size < actor.max_length:
        raise ConfigError(
            f"{key}={times_sp(tokens, group, sp_size)} is less than actor.max_length_per_device="
            f"{times_sp(actor.max_length_per_device, 'actor', actor.sp_size)}, so a sequence may not fit"
        )


def filtering_of_groups_of_one(rollout: Rollout, train_data: TrainData) -> None:
    """Refuse rollout.dynamic_filtering with train_data.responses_per_prompt=1."""
    if rollout.dynamic_filtering and train_data.responses_per_prompt == 1:
        raise ConfigError(
            "rollout.dynamic_filtering=true drops every group of one (train_data.responses_per_prompt=1); "
            "set rollout.dynamic_filtering=false"
        )


def filtering_rounds_without_filtering(rollout: Rollout) -> None:
    """Refuse rollout.dynamic_filtering_rounds above 1 without rollout.dynamic_filtering and rollout.filter."""
    if rollout.dynamic_filtering_rounds > 1 and not rollout.dynamic_filtering and rollout.filter is None:
        raise ConfigError(
            f"rollout.dynamic_filtering_rounds={rollout.dynamic_filtering_rounds} has no effect with "
            "rollout.dynamic_filtering=false"
        )


# advantages


def overlong_buffer_longer_than_a_response(adv: Advantage, rollout: Rollout) -> None:
    """Refuse an adv.overlong_buffer above rollout.train_sampling_params.max_new_tokens."""
    if adv.overlong_buffer > rollout.train_sampling_params.max_new_tokens:
        raise ConfigError(
            f"adv.overlong_buffer={adv.overlong_buffer} is more than "
            f"rollout.train_sampling_params.max_new_tokens={rollout.train_sampling_params.max_new_tokens}"
        )


def overlong_penalty_without_a_buffer(adv: Advantage) -> None:
    """Refuse adv.overlong_penalty with adv.overlong_buffer=0."""
    if adv.overlong_penalty != 1 and not adv.overlong_buffer:
        raise ConfigError("adv.overlong_penalty has no effect with adv.overlong_buffer=0")


def overlong_buffer_with_several_turns(adv: Advantage, rollout: Rollout) -> None:
    """Refuse adv.overlong_buffer with rollout.max_turns above 1."""
    if adv.overlong_buffer and rollout.max_turns > 1:
        raise ConfigError(
            f"adv.overlong_buffer={adv.overlong_buffer} is defined for one response; "
            f"set it to 0 or rollout.max_turns={rollout.max_turns} to 1"
        )


# data, tests and checkpoints


def curriculum_without_rows(train_data: TrainData) -> None:
    """Refuse train_data.curriculum without train_data.path."""
    if train_data.path is None and train_data.curriculum != "none":
        raise ConfigError(
            f"train_data.curriculum={train_data.curriculum} needs train_data.path: tasks that the environment "
            "generates never occur again"
        )


def missing_test_set(trainer: RLTrainer, test_sets: list[TestSettings]) -> None:
    """Refuse trainer.test_freq without test_data.path, test_data.prompts_per_rollout and test_data.sets."""
    if trainer.test_freq and not test_sets:
        raise ConfigError(
            f"trainer.test_freq={trainer.test_freq} needs test_data.path, or test_data.prompts_per_rollout "
            "tasks that the environment generates, or test_data.sets"
        )


def eval_only_of_a_checkpoint_in_its_own_folder(trainer: RLTrainer) -> None:
    """Refuse trainer.eval_only with a trainer.load_ckpt_from that is looked up in trainer.save_dir."""
    if trainer.eval_only and trainer.load_ckpt_from in ("latest", "best"):
        raise ConfigError(
            f"trainer.load_ckpt_from={trainer.load_ckpt_from} is looked up in trainer.save_dir, which is a new folder "
            "with trainer.eval_only=true; name the checkpoint's folder"
        )


def eval_only_without_a_test_set(trainer: RLTrainer, test_sets: list[TestSettings]) -> None:
    """Refuse trainer.eval_only without test_data.path, test_data.prompts_per_rollout and test_data.sets."""
    if trainer.eval_only and not test_sets:
        raise ConfigError(
            "trainer.eval_only=true needs test_data.path, test_data.prompts_per_rollout or test_data.sets"
        )


def best_model_without_tests(trainer: RLTrainer) -> None:
    """Refuse trainer.keep_best and trainer.early_stop without trainer.test_freq."""
    for key, is_on in (("trainer.keep_best", trainer.keep_best), ("trainer.early_stop", trainer.early_stop)):
        if is_on and trainer.test_freq is None:
            raise ConfigError(f"{key}=true has no effect without trainer.test_freq")


def missing_test_rows(data: SupervisedData, trainer: Trainer) -> None:
    """Refuse trainer.test_freq without data.test_path and data.test_ratio."""
    if trainer.test_freq is not None and data.test_path is None and data.test_ratio == 0:
        raise ConfigError(f"trainer.test_freq={trainer.test_freq} needs data.test_path or data.test_ratio")


def unused_test_rows(data: SupervisedData, trainer: Trainer) -> None:
    """Refuse data.test_path and data.test_ratio without trainer.test_freq."""
    if trainer.test_freq is None and data.test_ratio > 0:
        raise ConfigError(f"data.test_ratio={data.test_ratio} has no effect without trainer.test_freq")
    if trainer.test_freq is None and data.test_path is not None:
        raise ConfigError(f"data.test_path={data.test_path} has no effect without trainer.test_freq")


def reference_that_is_not_read(actor: DPOActor, ref_actor: RefActor) -> None:
    """Refuse ref_actor.model_name with actor.reference_free=true."""
    if actor.reference_free and ref_actor.model_name != actor.model_name:
        raise ConfigError("ref_actor.model_name has no effect with actor.reference_free=true")


RL_RULES: tuple[Rule, ...] = (
    overlapping_phases_of_the_actors_schedule,
    floor_of_the_actors_rate,
    overlapping_phases_of_the_critics_schedule,
    floor_of_the_critics_rate,
    missing_environment,
    engine_with_another_model,
    reference_that_cannot_follow,
    greedy_training_samples,
    training_at_another_temperature,
    importance_weights_of_a_cut_distribution,
    sampling_that_the_engine_lacks,
    response_longer_than_a_microbatch,
    sequence_longer_than_another_microbatch,
    overlong_buffer_longer_than_a_response,
    overlong_penalty_without_a_buffer,
    avg_length_without_a_constant_denominator,
    overlong_buffer_with_several_turns,
    regularize_on_without_a_regularizer,
    regularize_on_where_all_tokens_train,
    kept_steps_without_their_entropy_coefficient,
    observations_of_a_single_turn,
    kl_without_importance_weight_on_policy,
    hints_that_nobody_gives,
    exact_kl_beside_a_teacher,
    teachers_without_rows,
    experts_of_an_engine_that_records_none,
    adapters_alone,
    opponents_that_cannot_play,
    selection_of_trajectories_that_are_filtered,
    selection_of_on_policy_tokens_where_all_are,
    filtering_of_groups_of_one,
    filtering_rounds_without_filtering,
    missing_test_set,
    eval_only_of_a_checkpoint_in_its_own_folder,
    eval_only_without_a_test_set,
    best_model_without_tests,
    curriculum_without_rows,
)
SFT_RULES: tuple[Rule, ...] = (
    missing_test_rows,
    unused_test_rows,
    overlapping_phases_of_the_actors_schedule,
    floor_of_the_actors_rate,
)
RM_RULES: tuple[Rule, ...] = (
    missing_test_rows,
    unused_test_rows,
    overlapping_phases_of_the_critics_schedule,
    floor_of_the_critics_rate,
)
DPO_RULES: tuple[Rule, ...] = (*SFT_RULES, reference_that_is_not_read)
