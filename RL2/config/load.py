"""Loading of configurations: `load` makes every one of them.

The dataclasses of this package say what a key means, what it may be, and its default; `trainer/config/PROGRAM.yaml`
has what a program changes. Errors are `ConfigError`s that name the override to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from RL2.config.legacy_keys import Given, LegacyKeyError, translate
from RL2.config.programs import PROGRAMS
from RL2.config.secrets import masked
from RL2.config.values import build, defaults, keys, unset
from RL2.errors import ConfigError, first_line, printable


def load(program: str, overrides: Sequence[str]) -> Any:
    """Return the configuration of `program` with `key=value` overrides (Hydra's grammar), old keys of RL2 among them.

    Raises `ConfigError`, naming the override to fix, before anything else is loaded.
    """
    tree, values = composed(program, overrides)
    missing = unset(PROGRAMS[program], tree)
    rollout, teacher = tree.get("rollout"), tree.get("teacher")
    is_taught = isinstance(teacher, dict) and bool(teacher.get("model_name") or teacher.get("models"))
    if isinstance(rollout, dict) and not (is_taught or rollout.get("env_path") or rollout.get("agent")):
        missing.append("teacher.model_name" if program == "distill" else "rollout.env_path")
    if missing:
        raise ConfigError(_please_set(program, missing))
    return build(PROGRAMS[program], values, "")


def composed(program: str, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of all keys, unchecked: first with interpolations as they stand, then with these resolved.

    A required key that is not set is None. Raises ConfigError for an override that Hydra cannot apply.
    """
    overrides = [setting for one in _translated(program, overrides) for setting in one.settings]
    if removals := [override for override in overrides if override.startswith("~")]:
        raise ConfigError(f"{removals[0]}: a key cannot be removed; give it a value, or null")
    cls = PROGRAMS[program]
    ConfigStore.instance().store(name=cls.__name__, node=defaults(cls))  # what `defaults: [RLConfig]` of a YAML names
    try:
        with initialize_config_module("RL2.trainer.config", version_base="1.3"):
            composition = compose(program, overrides=[_may_be_new(override) for override in overrides])
        tree: Any = OmegaConf.to_container(composition, resolve=False)
        values: Any = OmegaConf.to_container(composition, resolve=True)
    except Exception as error:  # of Hydra and OmegaConf, and what they do not catch: names of files, numbers, recursion
        raise ConfigError(_explained(program, overrides, error)) from error
    return tree, values


def renamed(program: str, overrides: Sequence[str]) -> list[str]:
    """Return a line for each override with a key of RL2 or its fork that has another name here: what it became."""
    return [one.note for one in _translated(program, overrides) if one.settings != [one.override]]


def _translated(program: str, overrides: Sequence[str]) -> list[Given]:
    try:
        return translate(program, overrides)
    except LegacyKeyError as error:
        raise ConfigError(str(error)) from error


def words(given: Sequence[str]) -> dict[str, Any]:
    """Return the values of `key=value` words, read as YAML. Raises `ConfigError`."""
    if unclear := [word for word in given if "=" not in word]:
        raise ConfigError(f"{unclear[0]!r} is not a setting; write key=value")
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(given)))
    except Exception as error:  # of YAML's, of OmegaConf's, of keys that contradict each other
        raise ConfigError(f"{' '.join(given)}: {first_line(error)}") from error
    return {str(key): value for key, value in values.items()}


def show(config: Any) -> str:
    """Return the resolved configuration as YAML, without secrets."""
    return printable(OmegaConf.to_yaml(OmegaConf.create(masked(asdict(config)))))


def _may_be_new(override: str) -> str:
    """Return the override so that Hydra accepts names of the user's own in the groups for these."""
    return f"++{override}" if override.startswith(FREE_GROUPS) else override


ARGS = "actor.objective_args"

COLUMNS = ("train_data.columns.", "test_data.columns.", "data.columns.")

FREE_GROUPS = (
    f"{ARGS}.",
    "actor.loss_args.",
    "adv.args.",
    "rollout.vllm.env.",
    "rollout.sglang.env.",
    "actor.chat_template_kwargs.",
    "critic.chat_template_kwargs.",
    "reward.weights.",
    "rollout.opponents.",
    "test_data.opponents.",
    "teacher.models.",
    "test_data.sets.",
    *COLUMNS,
)
"""Prefixes of keys whose names are the user's own."""


def _please_set(program: str, missing: list[str]) -> str:
    if len(missing) == 1:
        return f"{missing[0]} is not set; pass {missing[0]}=..."
    settings = " ".join(f"{key}=..." for key in missing)
    return f"{len(missing)} keys are not set; pass {settings} (`rl2 keys {program}` explains them)"


def _explained(program: str, overrides: Sequence[str], error: Exception) -> str:
    """Return Hydra's or OmegaConf's `error` as one line that names the override to change."""
    for override in overrides:
        if reason := _wrong_key(program, override) or _wrong_value(override):
            return reason
    key = getattr(error, "full_key", None)  # of OmegaConf's errors about interpolations
    culprits = [override for override in overrides if _key(override) == key]
    if culprits:
        return f"{_short(culprits[-1])}: {first_line(error)}"
    return f"{first_line(error)} (overrides: {' '.join(overrides)})"


def _wrong_key(program: str, override: str) -> str | None:
    """Return why `program` has no key for `override`; None if it has one."""
    known, key, value = keys(PROGRAMS[program]), _key(override), override.partition("=")[2]
    if "=" not in override or not key:
        return f"{_short(override)!r} is not an override; write key=value"
    if key in known or key.startswith(FREE_GROUPS):
        return None
    if any(each.startswith(f"{key}.") for each in known):
        return None if value.startswith("{") else f"{_short(override)}; {key} is a group: set {key}.NAME=value"
    near = difflib.get_close_matches(key, known, n=1)
    return f"{program} has no key {key!r}" + (f"; did you mean {near[0]}?" if near else "")


def _wrong_value(override: str) -> str | None:
    """Return why Hydra's grammar does not read `override` as one value; None if it does."""
    key, _, value = override.partition("=")
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except Exception:  # of Hydra, ANTLR, and recursion
        return f"{_short(override)}: {_syntax_error(key, value)}"
    if not parsed.is_sweep_override():
        return None
    if parsed.is_choice_sweep() and "(" not in value:
        return (
            f"""{_short(override)}: one value is expected; write a list as '{key}=[a,b]', a string as '{key}="a,b"'"""
        )
    return f"{_short(override)}: Hydra's sweeps are not supported; give one value (`rl2 sweep` makes several runs)"


def _syntax_error(key: str, value: str) -> str:
    """Return what a value that Hydra's grammar does not read most likely lacks."""
    for left, right in ("[]", "{}", "()"):
        if value.count(left) != value.count(right):
            return f"{left} and {right} do not match"
    if value.count("'") % 2 or value.count('"') % 2:
        return "a quotation mark is missing"
    if value.startswith("["):
        return f"""put items with special characters in quotes: '{key}=["...","..."]'"""
    example = "..." if '"' in value or len(value) > 50 else value
    return f"""put a value with special characters in quotes: '{key}="{example}"'"""


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+")


def _short(override: str) -> str:
    return override if len(override) <= 200 else f"{override[:200]}..."
