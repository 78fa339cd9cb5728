"""Translation of the keys of the original RL2 and of its SPO fork; every command is read through it.

In the tables SET stands for train and test, MODEL for actor and critic, KL for actor.kl and kl, and LAYOUT for the keys
of a reference model's layout. A key that ends in `.*` is a group, whose keys keep their names. The original renamed its
keys several times: the tables have the form of May 2026 (`rollout.train.path`) and those between it and the oldest,
whose keys are used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

PLACES = {
    "SET": ("train", "test"),
    "MODEL": ("actor", "critic"),
    "KL": ("actor.kl", "kl"),
    "LAYOUT": (
        "ddp_size",
        "tp_size",
        "sp_size",
        "cp_size",
        "dtype",
        "use_liger_kernel",
        "temperature",
        "offload_model",
    ),
}

TABLE: dict[str, str | dict[str, str]] = {
    # data of reinforcement learning
    "rollout.SET.path": {"Chenmien/EmptyDataset": "SET_data.path=null", "*": "SET_data.path={value}"},
    "data.SET_data_path": "SET_data.path",
    "rollout.SET.prompts_per_rollout": "SET_data.prompts_per_rollout",
    "rollout.SET_prompts_per_rollout": "SET_data.prompts_per_rollout",
    "data.prompts_per_rollout": "train_data.prompts_per_rollout",
    "rollout.SET.responses_per_prompt": "SET_data.responses_per_prompt",
    "SET_data.experience.responses_per_prompt": "SET_data.responses_per_prompt",
    "rollout.responses_per_prompt": "train_data.responses_per_prompt",
    "data.responses_per_prompt": "train_data.responses_per_prompt",
    "rollout.SET.prompt_key": "SET_data.columns.prompt",
    "SET_data.prompt_key": "SET_data.columns.prompt",
    "rollout.SET.messages_key": "SET_data.columns.messages",
    "SET_data.messages_key": "SET_data.columns.messages",
    "rollout.SET.apply_chat_template": {
        "true": "SET_data.columns.prompt=null",
        "false": "SET_data.columns.messages=null",
    },
    "SET_data.apply_chat_template": {
        "true": "SET_data.columns.prompt=null",
        "false": "SET_data.columns.messages=null",
    },
    # rollouts
    "actor.rollout.env_path": "rollout.env_path",
    "rollout.SET.max_turns": "rollout.max_turns",
    "SET_data.max_turns": "rollout.max_turns",
    "SET_data.experience.max_turns": "rollout.max_turns",
    "SET_data.experience.max_new_tokens": "rollout.SET_sampling_params.max_new_tokens",
    "SET_data.max_new_tokens": "rollout.SET_sampling_params.max_new_tokens",
    "rollout.SET.sampling_params.*": "rollout.SET_sampling_params.*",
    "SET_data.sampling_params.*": "rollout.SET_sampling_params.*",
    "rollout.SET_sampling_params.no_stop_trim": {"true": ""},
    "rollout.SET_sampling_params.top_k": {
        "-1": "rollout.SET_sampling_params.top_k=0",
        "*": "rollout.SET_sampling_params.top_k={value}",
    },
    "rollout.train.dynamic_filtering": "rollout.dynamic_filtering",
    "rollout.train.partial_rollout": "rollout.partial_rollout",
    "rollout.partial_rollout": {
        "true": "rollout.partial_rollout=0.5 rollout.max_staleness=1",
        "false": "rollout.partial_rollout=0",
        "*": "rollout.partial_rollout={value}",
    },
    "rollout.train.mask_offpolicy_data": "actor.select.on_policy",
    "train_data.experience.mask_offpolicy_data": "actor.select.on_policy",
    "rollout.server_args.model_path": "actor.model_name",
    "rollout.server_args.dtype": "rollout.dtype",
    "rollout.server_args.tp_size": "rollout.tp_size",
    "rollout.server_args.mem_fraction_static": "rollout.gpu_memory_utilization",
    "rollout.bucket_size": {"*": ""},
    "rollout.base_port": {"*": ""},
    # data of sft, rm and dpo
    "data.train.path": "data.path",
    "data.test.path": "data.test_path",
    "data.SET.max_length": "data.max_length",
    "data.train.batch_size": "data.batch_size",
    "data.SET.prompt_key": "data.columns.prompt",
    "data.SET.response_key": "data.columns.response",
    "data.SET.messages_key": "data.columns.messages",
    "data.SET.chosen_key": "data.columns.chosen",
    "data.SET.rejected_key": "data.columns.rejected",
    "data.SET.apply_chat_template": {"true": "data.columns.prompt=null", "false": "data.columns.messages=null"},
    # models
    "MODEL": {"fsdp": "", "*": "MODEL={value}"},
    "ref_actor": {"fsdp": "", "*": "ref_actor={value}"},
    "MODEL.optimizer.lr": "MODEL.lr",
    "MODEL.optimizer.weight_decay": "MODEL.weight_decay",
    "MODEL.optimizer.betas": "MODEL.betas",
    "MODEL.optimizer.eps": "MODEL.eps",
    "MODEL.scheduler.name": "MODEL.scheduler",
    "MODEL.scheduler.warmup_ratio": "MODEL.warmup_ratio",
    "MODEL.cp_size": "MODEL.sp_size",
    "MODEL.enable_gradient_checkpointing": "MODEL.gradient_checkpointing",
    "ref_actor.max_length_per_device": "ref_actor.max_inference_length_per_device",
    "KL.type": {"null": "actor.kl.coef=0", "*": "actor.kl.type={value}"},
    "KL.reward_estimator": "actor.kl.estimator",
    "KL.loss_estimator": "actor.kl.estimator",
    "kl.coef": "actor.kl.coef",
    "trainer.total_steps": "trainer.max_steps",
    "trainer.disable_wandb": {"true": "trainer.use_wandb=false", "false": "trainer.use_wandb=true"},
    # the fork's later names
    "actor.path.objective": {
        "positive_ce": "actor.objective=positive_ce",
        "bernoulli_kl_legacy": "actor.objective=spo actor.path.detach_target=false",
        "bernoulli_kl_detached": "actor.objective=spo actor.path.detach_target=true",
        "fixed_half_legacy": "actor.objective=spo_0p5 actor.path.region=above_half",
        "fixed_half": "actor.objective=spo_0p5 actor.path.region=all",
        "rank_jsd": "actor.objective=rank_jsd",
        "rank_kl": "actor.objective=rank_kl",
    },
    "actor.path.rank_cap": "actor.objective_args.rank_cap",
    "actor.path.token_entropy_quantile": "actor.select.entropy_quantile",
    "actor.path.normalize_selected_tokens": {
        "true": "actor.average_over=kept",
        "false": "actor.average_over=correct",
    },
    "SET_data.enable_thinking": "actor.chat_template_kwargs.enable_thinking",
    "actor.path.trim_padding": {"*": ""},
    "actor.path.length_bucketed_batches": {"*": ""},
    "actor.path.causal_padding_positions": {"*": ""},
    "actor.adam_betas": "actor.betas",
    "actor.attn_implementation": {"*": ""},
    "rollout.mamba_scheduler_strategy": {"*": ""},
    "rollout.release_memory_for_training": {"true": ""},
    "trainer.keep_checkpoints": "trainer.keep",
    "trainer.save_final_model": {"true": ""},
    "trainer.long_budget_seconds": {"0": ""},
}
"""Old key -> new key, for the same value; or old key -> {old value: new settings}, where `*` is any other value. An old
key without new settings is dropped: it asks for the default, or for something that does not change results here."""

REFUSED = {
    "MODEL=megatron": "RL2 has no Megatron; models are sharded by FSDP2, with MODEL.ddp_size, tp_size and sp_size",
    "ref_actor=megatron": "RL2 has no Megatron; the reference has the layout of the actor",
    "MODEL.tf_config.*": "RL2 has no Megatron; use MODEL.tp_size and MODEL.sp_size",
    "MODEL.optimizer.min_lr": "the learning rate has no floor here",
    "ref_actor.LAYOUT": "the reference has the actor's layout, dtype and temperature",
    "rollout.server_args.*": "servers get arguments by rollout.engine=sglang rollout.sglang.args=[...]",
    "rollout.test_ratio": "use slices: train_data.path='train[3%:]@NAME' test_data.path='train[:3%]@NAME'",
    "rollout.use_gem_env": "use rollout.env_path=envs/gem.py, and GEM_ENV for the game",
    "rollout.gem_env.*": "use rollout.env_path=envs/gem.py, and GEM_ENV for the game",
    "rollout.multi_agent.*": "RL2 has one policy and no agents that take turns",
    "trainer.stop_file": "RL2 watches no file; Ctrl-C ends a run with a checkpoint",
}
"""Old key, group of keys or setting without a counterpart -> why, and what to do."""

NEEDS = {"KL.reward_estimator": ("reward", "advantage"), "KL.loss_estimator": ("loss",)}
"""Old key -> the values of actor.kl.type with which it has an effect."""

RANKED = ("rank_jsd", "rank_kl")
FORK_RANK_CAP = "actor.objective_args.rank_cap=64"
"""Default of the fork's rank objectives; here it is 32."""


class LegacyKeyError(ValueError):
    """An old setting that has no counterpart here; the message is one line for the user."""


@dataclass(frozen=True)
class Given:
    """An override of a command, and the settings that it stands for here."""

    override: str
    settings: list[str]

    @property
    def note(self) -> str:
        """Line that tells the user what became of the override."""
        return f"{self.override} -> {' '.join(self.settings) or 'left out: it has no effect here'}"


def translate(program: str, overrides: Sequence[str]) -> list[Given]:
    """Return each override with the settings that it stands for here; an override without an old key stays as it is.

    Raises LegacyKeyError for an old key without a counterpart, and for a setting that is given in two forms with
    different values.
    """
    given: dict[str, Given] = {}
    for override in overrides:
        given.pop(_key(override), None)  # of the same key the last counts
        given[_key(override)] = Given(override, _settings(override))
    _refuse_idle_estimators(given)
    _refuse_two_values(list(given.values()))
    return list(_with_rank_cap(program, given).values())


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _value(override: str) -> str:
    return override.partition("=")[2].strip("'\"")


def _settings(override: str, said: str = "") -> list[str]:
    """Return the settings that `override` stands for; `said` is the user's form of it, for errors."""
    said = said or override
    if "=" not in override or override.startswith("~"):
        return [override]
    key, value = _key(override), override.partition("=")[2]
    place, _, name = key.rpartition(".")
    rule = RULES.get(key)
    for refused in (override.lstrip("+"), *((key, f"{place}.*") if rule is None else ())):
        if refused in REASONS:
            raise LegacyKeyError(f"{said}: {REASONS[refused]}")
    if isinstance(rule, dict):
        return _of_value(override, rule, said)
    if rule is not None:
        return _settings(f"{rule}={value}", said)
    if isinstance(group := RULES.get(f"{place}.*"), str):
        return _settings(f"{group.removesuffix('*')}{name}={value}", said)
    return [override]


def _of_value(override: str, rule: dict[str, str], said: str) -> list[str]:
    value = _value(override)
    settings = rule.get(value, rule.get(value.lower(), rule.get("*")))
    if settings is None:
        raise LegacyKeyError(f"{said}: it can only be {' or '.join(rule)} here")
    whole = override.partition("=")[2]
    here = [setting.format(value=whole) for setting in settings.split()]
    return [override] if here == [override.lstrip("+")] else here


def _refuse_idle_estimators(given: dict[str, Given]) -> None:
    """Raise LegacyKeyError for an estimator of a place (loss, reward) where the KL divergence is not computed."""
    types = [_value(setting) for one in given.values() for setting in one.settings if _key(setting) == "actor.kl.type"]
    for key, places in NEEDED.items():
        if key in given and (not types or types[-1] not in places):
            raise LegacyKeyError(f"{given[key].override} has no effect without actor.kl.type={' or '.join(places)}")


def _refuse_two_values(given: list[Given]) -> None:
    """Raise LegacyKeyError if old keys that share a new key have different values, or only that of tests is given."""
    by_key: dict[str, list[tuple[Given, str]]] = {}
    for one in given:
        for setting in one.settings:
            by_key.setdefault(_key(setting), []).append((one, _value(setting)))
    for key, settings in by_key.items():
        for (one, first), (another, second) in pairwise(settings):
            if not _equal(first, second):
                raise LegacyKeyError(
                    f"{one.override} and {another.override} are one setting here, {key}; give one value"
                )
        tested = [one for one, _ in settings if "test" in _key(one.override) and "test" not in key]
        if tested and len(tested) == len(settings):
            raise LegacyKeyError(
                f"{tested[0].override}: tests share {key} with training here; give {key}={settings[0][1]} for both"
            )


def _equal(first: str, second: str) -> bool:
    try:
        return float(first) == float(second)
    except ValueError:
        return first == second


def _with_rank_cap(program: str, given: dict[str, Given]) -> dict[str, Given]:
    """Return `given` with the fork's default of rank_cap where the objective reads it, and without it elsewhere."""
    settings = {_key(setting): _value(setting) for one in given.values() for setting in one.settings}
    is_fork = program == "path" or "actor.path.objective" in given
    objective = settings.get("actor.objective", "rank_jsd" if program == "path" else "")
    cap = given.get("actor.path.rank_cap")
    if is_fork and objective in RANKED and _key(FORK_RANK_CAP) not in settings:
        return given | {"": Given("the fork's default", [FORK_RANK_CAP])}
    if is_fork and objective not in RANKED and cap is not None:
        return given | {"actor.path.rank_cap": Given(cap.override, [])}
    return given


def _filled(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with its placeholders expanded: one row for each name that they stand for."""
    for name, meanings in PLACES.items():
        table = {
            key.replace(name, meaning): _replaced(row, name, meaning) if name in key else row
            for key, row in table.items()
            for meaning in (meanings if name in key else ("",))
        }
    return dict(table)


def _replaced(row: Any, name: str, meaning: str) -> Any:
    if isinstance(row, dict):
        return {value: settings.replace(name, meaning) for value, settings in row.items()}
    return row.replace(name, meaning) if isinstance(row, str) else row


RULES = _filled(TABLE)
REASONS: dict[str, str] = _filled(REFUSED)
NEEDED: dict[str, tuple[str, ...]] = _filled(NEEDS)


def rows() -> Iterator[tuple[str, str]]:
    """Yield the rows of the table in the documentation: an old setting, and the new one or why it is refused."""
    for key, row in TABLE.items():
        if isinstance(row, str):
            yield f"`{key}`", f"`{row}`"
            continue
        for value, settings in row.items():
            if settings != f"{key}={{value}}":
                there = f"`{key}`" if value == "*" else f"`{key}={value}`"
                yield there, f"`{settings.replace('={value}', '')}`" if settings else "left out"
    for key, reason in REFUSED.items():
        yield f"`{key}`", f"refused: {reason}"
