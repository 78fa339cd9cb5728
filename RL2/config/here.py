"""Checks of what a run needs on this machine: files, packages, interpreters, processes."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from RL2.config.agent import agent_of
from RL2.config.model import Critic, Trainable, TrainablePolicy, num_shards
from RL2.config.programs import Config, RLConfig, trained
from RL2.errors import ConfigError


def missing_here(config: Config) -> list[str]:
    """Return a line for each package or server interpreter that the run needs and this machine lacks."""
    group, model = trained(config)
    packages = {
        "trainer.use_wandb": ("wandb", "wandb", config.trainer.use_wandb),
        "trainer.use_trackio": ("trackio", "trackio", config.trainer.use_trackio),
        "trainer.use_tensorboard": ("tensorboard", "tensorboard", config.trainer.use_tensorboard),
    }
    packages[f"{group}.use_liger_kernel"] = "liger_kernel", "liger", model.use_liger_kernel
    if isinstance(model, TrainablePolicy):
        packages[f"{group}.lora.rank"] = ("peft", "lora", model.lora.rank > 0)
    if isinstance(config, RLConfig):
        packages["rollout.agent"] = ("uvicorn", "agents", config.rollout.agent is not None)
    missing = missing_packages(packages)
    servers = config.rollout.servers if isinstance(config, RLConfig) else None
    if servers is not None and not servers.urls and shutil.which(servers.python) is None:
        how = " (`make engine` builds .venv-vllm)" if servers.key == "vllm" else ""
        missing.append(f"rollout.{servers.key}.python={servers.python}: there is no such interpreter{how}")
    return missing


def missing_for_critic(critic: Critic) -> list[str]:
    """Return what a critic on this machine would lack, a line each."""
    return missing_packages({"critic.use_liger_kernel": ("liger_kernel", "liger", critic.use_liger_kernel)})


def missing_packages(packages: dict[str, tuple[str, str, bool]]) -> list[str]:
    """Return a line for each package that is wanted and missing; `packages` is key -> (package, extra, wanted)."""
    return [
        f"{key} needs a package that is not installed: pip install 'rl2-spo[{extra}]'"
        for key, (package, extra, wanted) in packages.items()
        if wanted and importlib.util.find_spec(package) is None
    ]


def check_critic_here(config: RLConfig) -> None:
    """Raise ConfigError for what a critic lacks on this machine: packages, processes to split it over."""
    if not config.trainer.dry_run and (missing := missing_for_critic(config.critic)):
        raise ConfigError(missing[0])
    _check_processes("critic", config.critic, config.trainer.dry_run)


def _check_processes(group: str, model: Trainable, dry_run: bool) -> None:
    """Raise ConfigError if the processes cannot be split as `model` asks; a dry run may be for other machines."""
    if "WORLD_SIZE" in os.environ or not dry_run:
        num_shards(model, int(os.environ.get("WORLD_SIZE", 1)), group)


def check_here(config: Config) -> None:
    """Raise `ConfigError` if a file or package is missing, or the processes do not fit the model's layout."""
    group, model = trained(config)
    if not config.trainer.dry_run and (missing := missing_here(config)):
        raise ConfigError(missing[0])
    _check_processes(group, model, config.trainer.dry_run)
    named: dict[str, str | None] = {f"{group}.chat_template": model.chat_template}
    if isinstance(config, RLConfig):
        if config.rollout.agent is not None:
            agent_of("rollout.agent", config.rollout.agent)
        named |= {"rollout.env_path": config.rollout.env_path, "train_data.path": config.train_data.path}
        for test_set in config.test_sets:
            named[f"{test_set.key}.path"] = test_set.path
            if test_set.env_path != config.rollout.env_path:
                named[f"{test_set.key}.env_path"] = test_set.env_path
    else:
        named |= {"data.path": config.data.path, "data.test_path": config.data.test_path}
        named |= {"data.env_path": config.data.env_path}
    for key, path in named.items():
        # a name without a suffix may be a hub data set or a folder; scripts and templates are always files
        if path is None:
            continue
        if key.endswith(("env_path", "chat_template")) and not Path(path).is_file():
            raise ConfigError(f"{key}={path}: there is no such file")
        if Path(path).suffix[1:].isalpha() and "@" not in path and not Path(path).exists():
            raise ConfigError(f"{key}={path}: there is no such file")
