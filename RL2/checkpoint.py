"""Save and resume: model, optimizer, position in the data, random states. A folder is complete or not there at all."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from RL2.config import ConfigError
from RL2.parallel.processes import Processes

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""A base under adapters is in the model's own folder already."""


class Resumable(Protocol):
    """What has a state for JSON: the data cursor."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Learner(Protocol):
    """What trains: a model, its optimizer, and how many optimizer steps were taken."""

    steps: int

    @property
    def policy(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...


def save(
    folder: Path,
    step: int,
    learner: Learner,
    cursor: Resumable,
    processes: Processes,
    critic: Learner | None = None,
) -> Path:
    """Write `folder/step_NNNNNN` (collective): first beside it, then renamed, so a crash leaves the last one whole."""
    target = folder / f"step_{step:06d}"
    partial = target.with_suffix(".partial")
    if processes.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait()
    for name, each in _learners(learner, critic).items():
        model_state, optimizer_state = get_state_dict(each.policy, each.optimizer, options=TRAINED)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial / name)
    save_file(_random_states(processes.device), partial / f"random_{processes.rank}.safetensors")
    processes.wait()
    if processes.is_first:
        notes = {"step": step, "optimizer_steps": learner.steps, "cursor": cursor.state_dict()}
        if critic is not None:
            notes["critic_steps"] = critic.steps
        (partial / "notes.json").write_text(json.dumps(notes, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    processes.wait()
    return target


def load(source: Path, learner: Learner, cursor: Resumable, processes: Processes, critic: Learner | None = None) -> int:
    """Restore everything from the checkpoint folder `source` (collective); returns the step to go on with."""
    notes = json.loads((source / "notes.json").read_text())
    if critic is not None and "critic_steps" not in notes:
        raise ConfigError(f"trainer.load_ckpt_from={source} has no critic, which adv.estimator=gae needs")
    for name, each in _learners(learner, critic).items():
        _load_state(source, name, each)
    learner.steps = notes["optimizer_steps"]
    if critic is not None:
        critic.steps = notes["critic_steps"]
    try:
        cursor.load_state_dict(notes["cursor"])
    except ValueError as error:
        raise ConfigError(f"trainer.load_ckpt_from={source}: {error}") from error
    states = source / f"random_{processes.rank}.safetensors"
    if states.exists():  # more processes than the checkpoint had: theirs start from the seed
        _restore_random_states(load_file(states), processes.device)
    return notes["step"]


def _learners(learner: Learner, critic: Learner | None) -> dict[str, Learner]:
    """Folder of a checkpoint -> what is kept in it."""
    return {"state": learner} if critic is None else {"state": learner, "critic": critic}


def _load_state(source: Path, name: str, learner: Learner) -> None:
    """Model and optimizer; the optimizer's settings stay those of the configuration."""
    model_state, optimizer_state = get_state_dict(learner.policy, learner.optimizer, options=TRAINED)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    try:
        dcp.load(state, checkpoint_id=source / name)
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]  # of the first process that failed
        raise ConfigError(f"trainer.load_ckpt_from={source} cannot be loaded: {str(cause) or repr(cause)}") from error
    # dcp reads what the model asks for, and would leave the rest of a larger one unread
    saved = dcp.FileSystemReader(source / name).read_metadata().state_dict_metadata
    if extra := {key for key in saved if key.startswith("model.")} - {f"model.{name}" for name in model_state}:
        raise ConfigError(f"trainer.load_ckpt_from={source} is of a larger model: it has {min(extra)}")
    knobs = [{k: v for k, v in group.items() if k != "params"} for group in learner.optimizer.param_groups]
    set_state_dict(
        learner.policy,
        learner.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED,
    )
    for group, own in zip(learner.optimizer.param_groups, knobs, strict=True):
        group.update(own)  # the configuration's word counts, not the checkpoint's


def find(load_ckpt_from: str | None, save_dir: Path) -> Path | None:
    """The checkpoint that the configuration asks for; None to start from the beginning.

    `latest` is the newest in `save_dir`, and None if there is none yet.
    """
    if load_ckpt_from is None:
        return None
    if load_ckpt_from == "latest":
        # one that was being written has a suffix, and may have its notes already
        found = [path for path in save_dir.glob("step_*") if not path.suffix and (path / "notes.json").is_file()]
        return max(found, default=None)
    source = Path(load_ckpt_from)
    if not (source / "notes.json").is_file():
        raise ConfigError(f"trainer.load_ckpt_from={source} is not a checkpoint (it has no notes.json)")
    return source


def prune(save_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for path in sorted(path for path in save_dir.glob("step_[0-9]*") if not path.suffix)[:-keep]:
        shutil.rmtree(path)


def set_aside_after(save_dir: Path, step: int) -> None:
    """Rename checkpoints of later steps: a run that goes on from `step` has another future, and `latest` is in it."""
    for path in save_dir.glob("step_[0-9]*"):
        if not path.suffix and int(path.name.removeprefix("step_")) > step:
            aside = path.with_suffix(".superseded")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    version, internal, _ = random.getstate()
    states = {"torch": torch.get_rng_state(), "python": torch.tensor([version, *internal], dtype=torch.int64)}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    version, *internal = states["python"].tolist()
    random.setstate((version, tuple(internal), None))
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
