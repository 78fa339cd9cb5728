"""Save and resume: model, optimizer, position in the data, random states. A folder is complete or not there at all."""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
from concurrent.futures import Future
from datetime import timedelta
from functools import partial as partial_function
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from RL2.errors import ConfigError, UserError, first_line
from RL2.io import digests, durable
from RL2.io.checkpoint_reader import Reader, TensorPlanner
from RL2.io.checkpoint_writer import Writer
from RL2.io.report import RECORDS, read_metrics
from RL2.parallel.processes import Processes

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""A base under adapters is in the model's own folder already."""

STATE, RANDOM, NOTES = "state", "random.safetensors", "notes.json"
"""Parts of a checkpoint's folder: weights and optimizers; random states of all processes; everything else."""


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


class CheckpointFailed(UserError, RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


class Checkpoints:
    """Writes the checkpoints of a run beside its training: a folder `step_NNNNNN` is complete, or not there at all.

    `save` copies what is to be written and comes back; a thread then writes `step_NNNNNN.partial` and renames it. One
    is written at a time: the next `save`, or `finish`, waits for the one before and raises what went wrong with it.
    """

    def __init__(
        self, folder: Path, processes: Processes, keep: int | None = None, models: dict[str, Any] | None = None
    ) -> None:
        """`keep`: how many of the newest stay; None: all. `models`: what they began with, which each notes."""
        self.models = models or {}
        self.rows: dict[str, str] = {}
        """Name of a data set -> digest, which each checkpoint notes."""
        self.folder, self.processes, self.keep = folder, processes, keep
        # of their own: their collectives run beside those of training
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=processes.timeout_s))
        self.step = 0
        """Of the checkpoint that is being written, or was last."""
        self.written: Future[None] | None = None

    def save(self, step: int, learner: Learner, cursor: Resumable, critic: Learner | None = None) -> None:
        """Begin to write `folder/step_NNNNNN` (collective)."""
        self.finish()
        self.step, self.written = step, Future()
        target = self.folder / f"step_{step:06d}"
        partial = target.with_suffix(".partial")
        notes = {"step": step, "optimizer_steps": learner.steps, "cursor": cursor.state_dict()}
        notes |= {"models": self.models, "rows": self.rows}
        if critic is not None:
            notes["critic_steps"] = critic.steps
        states = self.processes.gather([_random_states(self.processes.device)], "the random states of all processes")
        if self.processes.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            named = {f"{rank}.{name}": x for rank, state in enumerate(states) for name, x in state.items()}
            save_file(named, partial / RANDOM)
            (partial / NOTES).write_text(json.dumps(notes, indent=1))
        self.processes.wait("the folder of a checkpoint")
        writer = Writer(partial / STATE)
        upload = dcp.async_save(_state(_learners(learner, critic)), storage_writer=writer, process_group=self.group)
        assert isinstance(upload, Future)
        upload.add_done_callback(partial_function(self._publish, partial, target, writer, self.written))

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Raises `CheckpointFailed`."""
        if self.written is None:
            return
        written, self.written = self.written, None
        try:
            written.result(self.processes.timeout_s)
        except TimeoutError as error:
            raise self.processes.lost(f"the checkpoint of step {self.step} to be written") from error
        except (Exception, dcp.CheckpointException) as error:  # which is none
            cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
            raise CheckpointFailed(
                f"the checkpoint of step {self.step} could not be written into {self.folder} "
                f"({first_line(cause)}); go on from the one before it with trainer.load_ckpt_from=latest"
            ) from error

    def _publish(self, partial: Path, target: Path, writer: Writer, written: Future[None], upload: Future[Any]) -> None:
        """Give the folder its name, now that all processes have written their parts."""
        try:
            upload.result()
            if self.processes.is_first:
                of_state = {f"{STATE}/{name}": digest for name, digest in writer.digests.items()}
                digests.write(partial, of_state | digests.of_files(partial, [NOTES, RANDOM]))
                for name in RECORDS:  # a run that goes on from here keeps what they say of the steps before
                    if (self.folder / name).exists():
                        durable.sync(self.folder / name)
                durable.replace_folder(partial, target)
                if self.keep is not None:
                    prune(self.folder, self.keep)
        except BaseException as error:
            written.set_exception(error)
        else:
            written.set_result(None)


def _learners(learner: Learner, critic: Learner | None) -> dict[str, Learner]:
    """By the prefix of their names in a checkpoint."""
    return {"": learner} if critic is None else {"": learner, "critic_": critic}


def _state(learners: dict[str, Learner]) -> dict[str, Any]:
    """What is kept of models and optimizers. The optimizers' settings are the configuration's, so they are not."""
    state: dict[str, Any] = {}
    for prefix, each in learners.items():
        model, optimizer = get_state_dict(each.policy, each.optimizer, options=TRAINED)
        state |= {f"{prefix}model": model, f"{prefix}optimizer": optimizer["state"]}
    return state


def load(source: Path, learner: Learner, cursor: Resumable, processes: Processes, critic: Learner | None = None) -> int:
    """Restore everything from the checkpoint folder `source` (collective); returns the step to go on with.

    The processes may be others than those that saved it, in number and layout. Raises ConfigError for a checkpoint of
    something else, or a damaged one.
    """
    notes = _notes(source)
    if critic is not None and "critic_steps" not in notes:
        raise ConfigError(f"trainer.load_ckpt_from={source} has no critic, which adv.estimator=gae needs")
    learners = _learners(learner, critic)
    state = _state(learners)
    try:
        dcp.load(state, storage_reader=Reader(source / STATE), planner=TensorPlanner())
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]  # of the first process that failed
        raise ConfigError(
            f"trainer.load_ckpt_from={source} cannot be loaded: {first_line(cause).rstrip('.')}"
        ) from error
    # dcp reads what the model asks for, and would leave the rest of a larger one unread
    saved = Reader(source / STATE).read_metadata().state_dict_metadata
    if extra := {key for key in saved if key.startswith("model.")} - {f"model.{name}" for name in state["model"]}:
        raise ConfigError(f"trainer.load_ckpt_from={source} is of a larger model: it has {min(extra)}")
    for prefix, each in learners.items():
        _restore(each, state[f"{prefix}model"], state[f"{prefix}optimizer"])
        each.steps = notes[f"{prefix or 'optimizer_'}steps"]
    try:
        cursor.load_state_dict(notes["cursor"])
    except ValueError as error:
        raise ConfigError(f"trainer.load_ckpt_from={source}: {error}") from error
    try:
        own = {
            name.partition(".")[2]: x
            for name, x in load_file(source / RANDOM).items()
            if name.startswith(f"{processes.rank}.")
        }
        if own:  # more processes than the checkpoint had: theirs start from the seed
            _restore_random_states(own, processes.device)
    except Exception as error:  # of safetensors, and of each kind of random state
        raise _damaged(source / RANDOM, error) from error
    return notes["step"]


def models(source: Path) -> dict[str, Any]:
    """What the models of a checkpoint's run began with; empty if it cannot be known."""
    return _noted(source, "models")


def rows(source: Path) -> dict[str, Any]:
    """Return name of a data set -> digest of its rows, of a checkpoint's run; empty if it cannot be known."""
    return _noted(source, "rows")


def _noted(source: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((source / NOTES).read_text())[name])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _notes(source: Path) -> dict[str, Any]:
    """Raises ConfigError if they are damaged."""
    try:
        notes = json.loads((source / NOTES).read_text())
        numbers = {"step", "optimizer_steps", *(notes.keys() & {"critic_steps"})}
        if any(type(notes[name]) is not int or not 0 <= notes[name] < 2**63 for name in numbers):
            raise ValueError("steps have to be whole numbers")
        if not isinstance(notes["cursor"], dict):
            raise ValueError("the position in the data has to be an object")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(source / NOTES, error) from error
    return notes


def _damaged(file: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{file} is damaged: {type(error).__name__}: {first_line(error)}; go on from another checkpoint")


def load_weights(source: Path, policy: nn.Module) -> None:
    """The weights alone of the checkpoint folder `source`, into a whole model on this process, without torchrun.

    Raises ConfigError for a checkpoint of something else, or a damaged one.
    """
    weights = get_model_state_dict(policy, options=TRAINED)
    kept = stored_weights(source)
    try:
        if kept != weights.keys():
            whose = "checkpoint" if kept - weights.keys() else "model"
            name = min(kept - weights.keys() or weights.keys() - kept)
            raise ConfigError(f"{source} is of another kind of model: only the {whose} has {name}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant
            dcp.load({"model": weights}, storage_reader=Reader(source / STATE), planner=TensorPlanner(), no_dist=True)
    except ConfigError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # which is none
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise ConfigError(f"{source} cannot be loaded: {first_line(cause)}") from error


def stored_weights(source: Path) -> set[str]:
    """Names of what trained, without the critic beside it. Raises ConfigError if they cannot be read."""
    try:
        saved = Reader(source / STATE).read_metadata().state_dict_metadata
    except (Exception, dcp.CheckpointException) as error:  # of a damaged or hostile pickle anything may come
        raise ConfigError(f"{source} cannot be loaded: {first_line(error)}") from error
    return {key.removeprefix("model.") for key in saved if key.startswith("model.")}


def _restore(learner: Learner, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
    own = get_state_dict(learner.policy, learner.optimizer, options=TRAINED)[1]
    set_state_dict(
        learner.policy,
        learner.optimizer,
        model_state_dict=model,
        optim_state_dict={"state": optimizer, "param_groups": own["param_groups"]},
        options=TRAINED,
    )


def candidates(load_ckpt_from: str | None, save_dir: Path) -> list[Path]:
    """Return the checkpoints that the configuration asks for, the first choice first; none: start from the beginning.

    `latest` is those in `save_dir`, newest first, if there are any; `best` the one whose step has the best test score
    in its metrics.jsonl, the first of equals. Raises ConfigError where there is none such.
    """
    if load_ckpt_from is None:
        return []
    if load_ckpt_from == "latest":
        return _of_steps(save_dir)[::-1]
    if load_ckpt_from == "best":
        tests = read_metrics(save_dir)
        scores = {row["step"]: row["test/score"] for row in tests if isinstance(row.get("test/score"), float | int)}
        found = [path for path in _of_steps(save_dir) if (path / NOTES).is_file()]
        tested = {path: scores[step] for path in found if (step := step_of(path)) in scores}
        if not tested:
            raise ConfigError(
                f"trainer.load_ckpt_from=best: {save_dir} has no checkpoint of a step that was tested "
                "(trainer.save_freq, trainer.test_freq)"
            )
        return [max(tested, key=lambda path: tested[path])]
    source = Path(load_ckpt_from)
    if not (source / NOTES).is_file():
        raise ConfigError(f"trainer.load_ckpt_from={source} is not a checkpoint (it has no notes.json)")
    return [source]


def choose(
    load_ckpt_from: str | None, save_dir: Path, processes: Processes | None = None
) -> tuple[Path | None, list[str]]:
    """Return the first of `candidates` whose files are as they were written, and what is wrong with those before it.

    None to start from the beginning. Collective, if there are `processes`. Raises ConfigError if all are damaged.
    """
    if processes is None:
        found = candidates(load_ckpt_from, save_dir)
    else:  # the other machines may see an older listing of the folder
        found = processes.of_first(lambda: candidates(load_ckpt_from, save_dir), "the choice of a checkpoint")
    damaged: list[str] = []
    for source in found:
        if not (why := damage(source, processes)):
            return source, damaged
        damaged.append(f"{source} is damaged: {why}")
    if damaged:
        raise ConfigError(
            f"trainer.load_ckpt_from={load_ckpt_from}: {'; '.join(damaged)}; go on from another checkpoint"
        )
    return None, []


def damage(source: Path, processes: Processes | None = None) -> str:
    """Return what is wrong with the files of a checkpoint; "" if each is as it was written.

    Collective, if there are `processes`: each reads a part of the files.
    """
    rank, size = (0, 1) if processes is None else (processes.rank, processes.world_size)
    try:
        expected = digests.read(source, (NOTES, RANDOM, f"{STATE}/.metadata"))
        mine = {name: expected[name] for name in sorted(expected)[rank::size]}
        found = digests.faults(source, mine)
    except ValueError as error:
        found = [str(error)]
    if processes is not None:
        found = processes.gather(found, "the digests of a checkpoint")
    return found[0] if found else ""


def step_of(path: Path) -> int:
    """Of a checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def _of_steps(save_dir: Path) -> list[Path]:
    """Folders with the name of a checkpoint, oldest first."""
    named = [path for path in save_dir.glob("step_*") if re.fullmatch(r"step_[0-9]+", path.name)]
    return sorted(named, key=step_of)


def prune(save_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for path in _of_steps(save_dir)[:-keep]:
        durable.remove(path)


def set_aside_after(save_dir: Path, step: int) -> None:
    """Rename checkpoints of later steps: a run that goes on from `step` has another future, and `latest` is in it.

    What a process that died left half written is removed.
    """
    for path in save_dir.glob("step_*.partial"):
        shutil.rmtree(path)
    for path in _of_steps(save_dir):
        if step_of(path) > step:
            aside = path.with_suffix(".superseded")
            if aside.exists():
                durable.remove(aside)
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
