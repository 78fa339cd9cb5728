"""Checkpoints: model, optimizer, position in the data and random states. A folder is either complete or absent."""

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from RL2.errors import ConfigError, UserError, first_line
from RL2.io import digests, durable
from RL2.io.checkpoint_reader import Reader, TensorPlanner
from RL2.io.checkpoint_writer import Writer
from RL2.io.report import RECORDS, read_metrics
from RL2.parallel.processes import Processes

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
"""Options that leave out frozen parameters: the base model under adapters is already in the model's own folder."""

STATE, RANDOM, NOTES = "state", "random.safetensors", "notes.json"
"""Entries of a checkpoint folder: weights and optimizers; random states of all processes; everything else."""


class Resumable(Protocol):
    """An object with a JSON-serialisable state, such as the data cursor."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Learner(Protocol):
    """A model in training with its optimizer and the number of optimizer steps taken."""

    steps: int

    @property
    def kept_model(self) -> nn.Module | None:
        """Another model whose weights change in training and are part of its state; None if there is none."""
        ...

    @property
    def policy(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...


class CheckpointFailed(UserError, RuntimeError):
    """A checkpoint could not be written. Earlier checkpoints are intact."""


class Checkpoints:
    """Writer of a run's checkpoints in the background. A folder `step_NNNNNN` is either complete or absent.

    `save` copies the state and returns; a thread then writes `step_NNNNNN.partial` and renames it. One checkpoint is
    written at a time: the next call of `save` or `finish` waits for the previous one and raises its error.
    """

    def __init__(
        self, folder: Path, processes: Processes, keep: int | None = None, models: dict[str, Any] | None = None
    ) -> None:
        """Set up an empty writer.

        `keep` is the number of newest checkpoints to keep; None keeps all. `models` describes the models that the run
        began with and is stored in each checkpoint.
        """
        self.models = models or {}
        self.rows: dict[str, str] = {}
        """Data set name -> digest of its rows; stored in each checkpoint."""
        self.folder, self.processes, self.keep = folder, processes, keep
        # a separate group: its collectives run concurrently with those of training
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=processes.timeout_s))
        self.step = 0
        """Step of the checkpoint that is being written, or was written last."""
        self.written: Future[None] | None = None

    def save(self, step: int, learner: Learner, cursor: Resumable, critic: Learner | None = None) -> None:
        """Start writing `folder/step_NNNNNN` (collective). Raise `CheckpointFailed` if the previous write failed."""
        self.finish()
        self.step, self.written = step, Future()
        target = self.folder / f"step_{step:06d}"
        partial = target.with_suffix(".partial")
        notes = {"step": step, "optimizer_steps": learner.steps, "cursor": cursor.state_dict()}
        notes |= {"models": self.models, "rows": self.rows, "has_teacher": learner.kept_model is not None}
        if critic is not None:
            notes["critic_steps"] = critic.steps
        states = self.processes.gather([_random_states(self.processes.device)], "the random states of all processes")
        if self.processes.is_first:
            named = {f"{rank}.{name}": x for rank, state in enumerate(states) for name, x in state.items()}
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                save_file(named, partial / RANDOM)
                (partial / NOTES).write_text(json.dumps(notes, indent=1))
            except (OSError, SafetensorError) as error:
                raise self._failed(error) from error
        self.processes.wait("the folder of a checkpoint")
        writer = Writer(partial / STATE)
        upload = dcp.async_save(_state(_learners(learner, critic)), storage_writer=writer, process_group=self.group)
        assert isinstance(upload, Future)
        upload.add_done_callback(partial_function(self._publish, partial, target, writer, self.written))

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any. Raise `CheckpointFailed` if it failed."""
        if self.written is None:
            return
        written, self.written = self.written, None
        try:
            written.result(self.processes.timeout_s)
        except TimeoutError as error:
            raise self.processes.lost(f"the checkpoint of step {self.step} to be written") from error
        except (Exception, dcp.CheckpointException) as error:  # CheckpointException is not an Exception
            cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
            raise self._failed(cause) from error

    def _failed(self, cause: BaseException) -> CheckpointFailed:
        return CheckpointFailed(
            f"the checkpoint of step {self.step} could not be written into {self.folder} "
            f"({first_line(cause)}); resume from the previous one with trainer.load_ckpt_from=latest"
        )

    def _publish(self, partial: Path, target: Path, writer: Writer, written: Future[None], upload: Future[Any]) -> None:
        """Rename the folder once all processes have written their parts."""
        try:
            upload.result()
            if self.processes.is_first:
                of_state = {f"{STATE}/{name}": digest for name, digest in writer.digests.items()}
                digests.write(partial, of_state | digests.compute(partial, [NOTES, RANDOM]))
                for name in RECORDS:  # a run that resumes from here keeps the records of earlier steps
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
    """Return the learners by the prefix of their names in a checkpoint."""
    return {"": learner} if critic is None else {"": learner, "critic_": critic}


def _state(learners: dict[str, Learner]) -> dict[str, Any]:
    """Return the state of models and optimizers, without optimizer settings: those come from the configuration."""
    state: dict[str, Any] = {}
    for prefix, each in learners.items():
        model, optimizer = get_state_dict(each.policy, each.optimizer, options=TRAINED)
        state |= {f"{prefix}model": model, f"{prefix}optimizer": optimizer["state"]}
        if each.kept_model is not None:
            state[f"{prefix}teacher"] = get_model_state_dict(each.kept_model, options=TRAINED)
    return state


def load(source: Path, learner: Learner, cursor: Resumable, processes: Processes, critic: Learner | None = None) -> int:
    """Restore everything from the checkpoint folder `source` (collective) and return the step to resume at.

    The number and layout of processes may differ from those that saved it. Raise ConfigError if the checkpoint is
    damaged or does not fit the model.
    """
    notes = _notes(source)
    if critic is not None and "critic_steps" not in notes:
        raise ConfigError(f"trainer.load_ckpt_from={source} has no critic, which adv.estimator=gae needs")
    if learner.kept_model is not None and not notes.get("has_teacher"):
        raise ConfigError(f"trainer.load_ckpt_from={source} has no average of the policy, which the teacher is")
    learners = _learners(learner, critic)
    state = _state(learners)
    try:
        dcp.load(state, storage_reader=Reader(source / STATE), planner=TensorPlanner())
    except dcp.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]  # of the first process that failed
        raise ConfigError(
            f"trainer.load_ckpt_from={source} cannot be loaded: {first_line(cause).rstrip('.')}"
        ) from error
    # dcp reads only what the model asks for, so a larger model would load silently
    saved = Reader(source / STATE).read_metadata().state_dict_metadata
    if extra := {key for key in saved if key.startswith("model.")} - {f"model.{name}" for name in state["model"]}:
        raise ConfigError(f"trainer.load_ckpt_from={source} belongs to a larger model: it also has {min(extra)}")
    for prefix, each in learners.items():
        _restore(each, state[f"{prefix}model"], state[f"{prefix}optimizer"])
        if each.kept_model is not None:
            set_model_state_dict(each.kept_model, state[f"{prefix}teacher"], options=TRAINED)
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
        if own:  # empty on processes beyond those that saved it: they start from the seed
            _restore_random_states(own, processes.device)
    except Exception as error:  # safetensors and each random state raise their own types
        raise _damaged(source / RANDOM, error) from error
    return notes["step"]


def models(source: Path) -> dict[str, Any]:
    """Return the models that a checkpoint's run began with; empty if the file is damaged or does not say."""
    return _noted(source, "models")


def rows(source: Path) -> dict[str, Any]:
    """Return data set name -> digest of its rows, from a checkpoint; empty if the file is damaged or does not say."""
    return _noted(source, "rows")


def _noted(source: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((source / NOTES).read_text())[name])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _notes(source: Path) -> dict[str, Any]:
    """Read and validate a checkpoint's `notes.json`. Raise ConfigError if it is damaged."""
    try:
        notes = json.loads((source / NOTES).read_text())
        numbers = {"step", "optimizer_steps", *(notes.keys() & {"critic_steps"})}
        if any(type(notes[name]) is not int or not 0 <= notes[name] < 2**63 for name in numbers):
            raise ValueError("steps must be integers")
        if not isinstance(notes["cursor"], dict):
            raise ValueError("the position in the data must be an object")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(source / NOTES, error) from error
    return notes


def _damaged(file: Path, error: Exception) -> ConfigError:
    what = f"{file} is damaged: {type(error).__name__}: {first_line(error)}"
    return ConfigError(f"{what}; resume from another checkpoint")


def load_weights(source: Path, policy: nn.Module) -> None:
    """Load only the weights of the checkpoint folder `source` into an unsharded model, without torchrun.

    Raise ConfigError if the checkpoint is damaged or does not fit the model.
    """
    weights = get_model_state_dict(policy, options=TRAINED)
    stored = stored_weights(source)
    try:
        if stored != weights.keys():
            owner = "checkpoint" if stored - weights.keys() else "model"
            name = min(stored - weights.keys() or weights.keys() - stored)
            raise ConfigError(f"{source} does not fit the model: only the {owner} has {name}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended
            dcp.load({"model": weights}, storage_reader=Reader(source / STATE), planner=TensorPlanner(), no_dist=True)
    except ConfigError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # CheckpointException is not an Exception
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise ConfigError(f"{source} cannot be loaded: {first_line(cause)}") from error


def stored_weights(source: Path) -> set[str]:
    """Return the names of the trained weights, without the critic's. Raise ConfigError if they cannot be read."""
    try:
        saved = Reader(source / STATE).read_metadata().state_dict_metadata
    except (Exception, dcp.CheckpointException) as error:  # a damaged or hostile pickle raises anything
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
    """Return the checkpoints that `trainer.load_ckpt_from` asks for, preferred first; empty to start from step 0.

    `latest` gives those in `save_dir`, newest first, and may be empty. `best` gives the one whose step has the highest
    `test/score` in metrics.jsonl, the earliest of equals. Raise ConfigError if a requested checkpoint does not exist.
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
                f"trainer.load_ckpt_from=best: {save_dir} has no checkpoint of a tested step "
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
    """Return the first of `candidates` whose files are intact, and what is wrong with those before it.

    The result is None to start from step 0. Collective if `processes` is given. Raise ConfigError if all are damaged.
    """
    if processes is None:
        found = candidates(load_ckpt_from, save_dir)
    else:  # other machines may see an older listing of the folder
        found = processes.of_first(lambda: candidates(load_ckpt_from, save_dir), "the choice of a checkpoint")
    damaged: list[str] = []
    for source in found:
        if not (why := damage(source, processes)):
            return source, damaged
        damaged.append(f"{source} is damaged: {why}")
    if damaged:
        raise ConfigError(
            f"trainer.load_ckpt_from={load_ckpt_from}: {'; '.join(damaged)}; resume from another checkpoint"
        )
    return None, []


def damage(source: Path, processes: Processes | None = None) -> str:
    """Return what is wrong with the files of a checkpoint; "" if they match their digests.

    Collective if `processes` is given: each process reads a part of the files.
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
    """Return the step of a checkpoint folder."""
    return int(path.name.removeprefix("step_"))


def _of_steps(save_dir: Path) -> list[Path]:
    """Return the folders named like a checkpoint, oldest first."""
    named = [path for path in save_dir.glob("step_*") if re.fullmatch(r"step_[0-9]+", path.name)]
    return sorted(named, key=step_of)


def prune(save_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints."""
    for path in _of_steps(save_dir)[:-keep]:
        durable.remove(path)


def set_aside_after(save_dir: Path, step: int) -> None:
    """Rename the checkpoints of steps after `step`, so that `latest` does not mix two histories of one run.

    Half-written checkpoints of processes that died are removed.
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
