"""`load`, the one door through which a configuration comes in.

The YAML files in `trainer/config` hold the defaults of each program; the classes of this package say what a key means
and what it may be. Errors are `ConfigError`s that name the override to change.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from RL2.config.legacy_keys import Given, LegacyKeyError, translate
from RL2.config.programs import PROGRAMS
from RL2.config.secrets import masked
from RL2.config.values import build
from RL2.errors import ConfigError, first_line, printable


def load(program: str, overrides: Sequence[str]) -> Any:
    """Return the configuration of `program` with `key=value` overrides (Hydra's grammar), old keys of RL2 among them.

    Raises `ConfigError`, naming the override to fix, before anything else is loaded.
    """
    overrides = [setting for one in _translated(program, overrides) for setting in one.settings]
    try:
        with initialize_config_module("RL2.trainer.config", version_base="1.3"):
            tree = compose(program, overrides=[_may_be_new(override) for override in overrides])
        values = OmegaConf.to_container(tree, resolve=True)
    except Exception as error:  # of Hydra and OmegaConf, and what they do not catch: names of files, numbers, recursion
        raise ConfigError(_in_the_users_words(program, overrides, error)) from error
    return build(PROGRAMS[program], values, "")


def renamed(program: str, overrides: Sequence[str]) -> list[str]:
    """Return a line for each override with a key of RL2 or its fork that is another here: what it became."""
    return [one.note for one in _translated(program, overrides) if one.settings != [one.override]]


def _translated(program: str, overrides: Sequence[str]) -> list[Given]:
    try:
        return translate(program, overrides)
    except LegacyKeyError as error:
        raise ConfigError(str(error)) from error


def words(given: Sequence[str]) -> dict[str, Any]:
    """What `key=value` words say, as YAML reads the values. Raises `ConfigError`."""
    if unclear := [word for word in given if "=" not in word]:
        raise ConfigError(f"{unclear[0]!r} is not a setting; write key=value")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(given)))
    except Exception as error:  # of YAML's, of OmegaConf's, of keys that contradict each other
        raise ConfigError(f"{' '.join(given)}: {first_line(error)}") from error
    return {str(key): value for key, value in values.items()}


def show(config: Any) -> str:
    """The resolved configuration as YAML, without secrets."""
    return printable(OmegaConf.to_yaml(OmegaConf.create(masked(asdict(config)))))


def _may_be_new(override: str) -> str:
    """Keys of these groups are not ours: none stands in a YAML."""
    return f"++{override}" if override.startswith(FREE_GROUPS) else override


ARGS = "actor.objective_args"

COLUMNS = ("train_data.columns.", "test_data.columns.", "data.columns.")

FREE_GROUPS = (
    f"{ARGS}.",
    "adv.args.",
    "rollout.vllm.env.",
    "rollout.sglang.env.",
    "actor.chat_template_kwargs.",
    "critic.chat_template_kwargs.",
    "reward.weights.",
    "test_data.sets.",
    *COLUMNS,
)


def _in_the_users_words(program: str, overrides: Sequence[str], error: Exception) -> str:
    keys = _keys(PROGRAMS[program], "")
    for override in overrides:
        if "=" not in override:
            return f"{override!r} is not an override; write key=value"
        key = override.split("=", 1)[0].lstrip("+~")
        if key not in keys and not key.startswith(FREE_GROUPS) and not any(k.startswith(f"{key}.") for k in keys):
            near = difflib.get_close_matches(key, keys, n=1)
            return f"{program} has no key {key!r}" + (f"; did you mean {near[0]}?" if near else "")
    return f"{first_line(error)} (overrides: {' '.join(overrides)})"


def _keys(cls: type, prefix: str) -> list[str]:
    """Return the keys of a group; NAME stands for a name of the user's own."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            keys += _keys(hint, f"{prefix}{name}.")
            continue
        keys.append(f"{prefix}{name}")
        if typing.get_origin(hint) is dict and is_dataclass(member := typing.get_args(hint)[1]):
            assert isinstance(member, type)
            keys += _keys(member, f"{prefix}{name}.NAME.")
    return keys
