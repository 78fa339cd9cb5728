"""The surroundings of every loop: processes, seed, folder, report, resuming, saving."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from RL2.config.load import show
from RL2.config.programs import Config
from RL2.config.secrets import masked
from RL2.config.trainer import RLTrainer
from RL2.config.trainer import Trainer as TrainerConfig
from RL2.data.cursor import Cursor
from RL2.errors import ConfigError, LostProcess, UserError, first_line
from RL2.io import checkpoint, durable
from RL2.io.checkpoint import CheckpointFailed, Checkpoints, Resumable
from RL2.io.progress import Progress
from RL2.io.report import Dashboard, Report, TensorBoard, Trackio, Wandb
from RL2.io.run_lock import RunLock
from RL2.parallel.agree import refuse_differences
from RL2.parallel.processes import Processes
from RL2.trainer import inputs
from RL2.trainer.interrupt import Interrupt, Interrupted, listening
from RL2.types import TokenBatch
from RL2.workers.learner import Learner

REPLAY_BATCH = "batch.safetensors"
"""The rollouts of a step that is kept for replay, as they are trained on; the model is in the same folder."""
EXPORTED = ("latest", "best", "critic")
"""Folders of models that a run replaces as it goes on."""
LAUNCHERS = "launchers.json"
"""The torchruns that began the run in a folder."""


@dataclass(frozen=True)
class Run:
    """The surroundings of one run on this process."""

    config: TrainerConfig
    save_dir: Path
    processes: Processes
    checkpoints: Checkpoints
    settings: dict[str, Any]
    """The whole configuration, for the dashboards."""
    closing: ExitStack
    """Stack that closes resources when the run ends, however it ends."""
    launchers: list[str]
    """The torchruns of this run's processes, one for each machine; empty without torchrun."""
    interrupt: Interrupt
    lock: RunLock
    """On `save_dir`; the first process holds it."""
    shown: str
    """The configuration as YAML."""
    source: Path | None
    """The checkpoint that the run goes on from."""
    progress: Progress
    """Lines and signs of life that the run prints while it works."""

    def report(self, num_steps: int) -> Report:
        dashboards: list[Dashboard] = []
        if self.processes.is_first and self.config.use_wandb:
            dashboards.append(Wandb(self.save_dir, self.config.project, self.config.experiment_name, self.settings))
        if self.processes.is_first and self.config.use_trackio:
            dashboards.append(Trackio(self.save_dir, self.config.project, self.config.experiment_name, self.settings))
        if self.processes.is_first and self.config.use_tensorboard:
            dashboards.append(TensorBoard(self.save_dir))
        limit = self.config.records_mib << 20
        return Report(self.save_dir, self.processes.is_first, num_steps, dashboards, self.progress, limit)

    def listing(self) -> Path | None:
        """Return where rows that are skipped are listed, a new file; None on processes that do not write it."""
        file = self.save_dir / "skipped_rows.jsonl"
        if self.processes.is_first:
            file.unlink(missing_ok=True)
        return file if self.processes.is_first else None

    def resume(self, learner: Learner, cursor: Resumable, report: Report, critic: Learner | None = None) -> int:
        """Restore the checkpoint that the run goes on from, if any; returns the step to begin with (collective).

        From here on the folder is this run's: its records are cut back, and its configuration is written.
        """
        source, step = self.source, 0
        for name, each in {"actor": learner, "critic": critic}.items():
            if each is not None:
                inputs.refuse_other_replicas(self.processes, each, name)
        if source is not None:
            with (
                self.progress.phase(f"loading {source}"),
                self.processes.expecting("the others in loading a checkpoint"),
            ):
                try:
                    step = checkpoint.load(source, learner, cursor, self.processes, critic)
                except ConfigError as error:
                    raise ConfigError(
                        f"{error}{differences(checkpoint.models(source), models(self.settings))}"
                    ) from error
            report.say(f"resumed from {source}: step {step}")
            if other := inputs.changed(source.parent / "config.yaml", self.shown):
                report.say(f"with other settings than before: {', '.join(other)}")
        elif self.config.load_ckpt_from is not None:
            report.say(f"there is no checkpoint in {self.save_dir} yet: the run begins at step 0")
        report.keep_before(step)
        if self.processes.is_first:
            for name in EXPORTED:
                durable.recover(self.save_dir / name)
            checkpoint.set_aside_after(self.save_dir, step)
            durable.write_text(self.save_dir / "config.yaml", self.shown)
            # from here on `latest` is of this run
            durable.write_text(self.save_dir / LAUNCHERS, json.dumps(self.launchers))
        self.processes.wait("the report to be cut back")
        if asked := self._asked():
            raise Interrupted(
                f"ended by {_name(asked)} before step {step}; start it again with the same command", asked
            )
        return step

    def save_if_due(
        self,
        step: int,
        learner: Learner,
        cursor: Resumable,
        tokenizer: PreTrainedTokenizerBase,
        critic: Learner | None = None,
    ) -> None:
        """Save a checkpoint to resume from at `step`, in the background, and the model as it is.

        Raises `Interrupted` after it if any process was asked to end.
        """
        self.processes.of_first(self.lock.refuse_if_lost, "whether the folder is still this run's")
        asked = self._asked()
        if asked or self.due(self.config.save_freq, step):
            with self.progress.phase(f"saving the checkpoint of step {step}"):
                self.checkpoints.save(step, learner, cursor, critic)
            self.export(learner, tokenizer, critic)
        if asked:
            self.finish()
            raise Interrupted(
                f"ended by {_name(asked)} after step {step - 1}; resume with trainer.save_dir={self.save_dir} "
                "trainer.load_ckpt_from=latest",
                asked,
            )

    def _asked(self) -> int | None:
        """Return the signal by which any process was asked to end (collective)."""
        asked = self.processes.gather([self.interrupt.asked], "whether the run goes on")
        return next((number for number in asked if number is not None), None)

    def export(self, learner: Learner, tokenizer: PreTrainedTokenizerBase, critic: Learner | None = None) -> None:
        """Write the model into `save_dir/latest`, and a critic into `save_dir/critic`."""
        self.export_to("latest", learner, tokenizer)
        if critic is not None:
            self.export_to("critic", critic, tokenizer)

    def export_to(
        self, name: str, learner: Learner, tokenizer: PreTrainedTokenizerBase, batch: TokenBatch | None = None
    ) -> None:
        """Write a model into `save_dir/NAME`, as `from_pretrained` of its class in transformers loads it (collective).

        A folder of that name is replaced in one moment. `batch` is put beside the model.
        """
        target, partial = self.save_dir / name, self.save_dir / f"{name}.partial"
        try:
            if self.processes.is_first:
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                durable.recover(target)
            with self.progress.phase(f"writing the model into {target}"):
                learner.export(tokenizer, partial)
            if self.processes.is_first:
                if batch is not None:
                    batch.save(partial / REPLAY_BATCH)
                durable.replace_folder(partial, target)
        except (OSError, SafetensorError) as error:
            raise CheckpointFailed(f"the model could not be written into {partial}: {first_line(error)}") from error
        self.processes.wait("the model to be written")

    def keep_for_replay(
        self, step: int, batch: TokenBatch, learner: Learner, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Write the model, and the batch that it trains on next, into `save_dir/replay_NNNNNN` (tools/replay.py)."""
        self.export_to(replay_folder(self.save_dir, step).name, learner, tokenizer, batch)

    def know_rows(self, rows: dict[str, str]) -> None:
        """Compare digests of the data with those of the other processes, and with the checkpoint's (collective).

        Raises ConfigError if the processes differ. Data that another start of the run had are said.
        """
        refuse_differences(self.processes, {f"the data of {name}": digest for name, digest in rows.items()})
        self.checkpoints.rows |= rows
        before = checkpoint.rows(self.source) if self.source is not None else {}
        for name, digest in rows.items():
            if before.get(name, digest) != digest:
                text = f"{name} has other rows than before: {digest}, and {self.source} was made with {before[name]}"
                self.progress.say(f"WARNING: {text}")

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        with self.progress.phase("writing the last checkpoint"):
            self.checkpoints.finish()

    def due(self, frequency: int | None, step: int) -> bool:
        return frequency is not None and step % frequency == 0


@contextmanager
def start(config: Config, progress: Progress | None = None) -> Iterator[Run]:
    """Join the other processes, seed, and make the run's folder; leave in order. `progress` says what goes on."""
    progress = progress or Progress(int(os.environ.get("RANK", 0)) == 0)
    trainer = config.trainer
    save_dir = Path(trainer.save_dir)
    # denormals are slow on CPUs and train nothing
    torch.set_flush_denormal(True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with progress.phase("waiting for all processes to join"):
        processes = Processes.start(trainer.timeout_s)
    progress.say(f"{processes.world_size} process(es), {processes.device.type}; the run writes into {save_dir}")
    lock = RunLock(save_dir)
    try:
        random.seed(trainer.seed)
        torch.manual_seed(trainer.seed)
        settings = masked(asdict(config))
        if processes.world_size > 1:
            with progress.phase("comparing what the processes were given"):
                refuse_differences(processes, inputs.facts(settings, files=processes.is_first_here))
        launchers = sorted(set(processes.gather(launcher(), "all processes to say who started them")))
        wanted = processes.of_first(
            lambda: take_folder(trainer, save_dir, launchers, lock, progress),
            "the first process to take trainer.save_dir",
        )
        source, damaged = checkpoint.choose(wanted, save_dir, processes)
        progress.say(*(f"WARNING: {fault}; the previous checkpoint is used" for fault in damaged))
        if source is not None:
            refuse_another_base(source, settings)
        checkpoints = Checkpoints(save_dir, processes, trainer.num_kept, models(settings))
        with ExitStack() as closing, listening() as interrupt:
            run = Run(
                trainer,
                save_dir,
                processes,
                checkpoints,
                settings,
                closing,
                launchers,
                interrupt,
                lock,
                show(config),
                source,
                progress,
            )
            yield run
            run.finish()
    except LostProcess:
        raise  # and leave: whoever still waits for this process will see that it has gone
    except BaseException:
        processes.stop()
        raise
    finally:
        lock.release()
    processes.stop()


def take_folder(
    trainer: TrainerConfig, save_dir: Path, launchers: list[str], lock: RunLock, progress: Progress
) -> str | None:
    """Take the lock on `save_dir`; returns what to go on from, as in `trainer.load_ckpt_from`.

    Processes that torchrun has started again take the newest checkpoint that the first ones wrote. Raises ConfigError,
    and has written nothing, if the folder is in use, holds another run, or has no such checkpoint.
    """

    def look() -> str | None:
        if begun_by(launchers, save_dir) and checkpoint.candidates("latest", save_dir):
            return "latest"
        is_test = isinstance(trainer, RLTrainer) and trainer.eval_only
        if is_test or (trainer.load_ckpt_from is None and not begun_by(launchers, save_dir)):
            refuse_another_run(save_dir)
        checkpoint.candidates(trainer.load_ckpt_from, save_dir)
        return trainer.load_ckpt_from

    look()
    lock.acquire(progress.say)
    return look()  # again: another run may have ended in between


def number_of_steps(trainer: TrainerConfig, cursor: Cursor) -> int:
    """Return `max_steps`, or as many steps as `n_epochs` give."""
    if trainer.max_steps is not None:
        return trainer.max_steps
    try:
        return cursor.batches(trainer.n_epochs)
    except ValueError as error:
        raise ConfigError(f"{error}; lower the batch or raise trainer.n_epochs") from error


def refuse_another_run(save_dir: Path) -> None:
    """Raise ConfigError if there is one in the folder of a run that begins."""
    if (save_dir / "metrics.jsonl").exists():
        raise ConfigError(
            f"trainer.save_dir={save_dir} already contains a run; resume it (trainer.load_ckpt_from=latest) "
            "or choose another trainer.save_dir"
        )


def models(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's models began with, of its configuration; a checkpoint keeps it in its notes."""
    found = {f"{group}.model_name": settings[group]["model_name"] for group in ("actor", "critic") if group in settings}
    lora = settings.get("actor", {}).get("lora")
    if lora is not None:
        found["actor.lora.rank"] = lora["rank"]
        if lora["rank"]:
            found |= {f"actor.lora.{name}": as_json(lora[name]) for name in ("alpha", "target_modules")}
    return found


def refuse_another_base(source: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError if the adapters of a checkpoint would go on with another base, or as other adapters."""
    began, ours = checkpoint.models(source), models(settings)
    if not (began.get("actor.lora.rank") and ours.get("actor.lora.rank")):
        return  # whole weights take the place of what the model began with
    if told := differences({key: began[key] for key in began if key.startswith("actor.")}, ours):
        raise ConfigError(
            f"trainer.load_ckpt_from={source} contains only adapters{told}; pass the model that they were "
            "trained on (a link to it, if it has moved) and its actor.lora"
        )


def as_json(value: Any) -> Any:
    """Return `value` as it is after being written to JSON and read again."""
    return json.loads(json.dumps(value))


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Describe how the models of another run differ from those of this one, for the end of an error."""
    told = [
        f"{key}={their}, and here it is {ours[key]}"
        for key, their in theirs.items()
        if not is_same(their, ours.get(key, their))
    ]
    return f"; its run had {' and '.join(told)}" if told else ""


def is_same(their: Any, our: Any) -> bool:
    """Return whether two settings are equal, or two paths to one folder."""
    if their == our:
        return True
    folders = [Path(each) for each in (their, our) if isinstance(each, str) and Path(each).is_dir()]
    return len(folders) == 2 and folders[0].samefile(folders[1])


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def replay_folder(save_dir: Path, step: int) -> Path:
    return save_dir / f"replay_{step:06d}"


def kept_step(path: Path, step: str = "latest") -> tuple[Path, int]:
    """Return a run and the number of a step that it has kept; `path` is the run's folder, or that of the step.

    `step` is a number or `latest`. Raise UserError if there is no such step.
    """
    if path.name.startswith("replay_") and path.name.removeprefix("replay_").isdigit():
        path, step = path.parent, path.name.removeprefix("replay_")
    if not path.is_dir():
        raise UserError(f"{path}: there is no such folder")
    # folders without a batch were never finished
    names = (file.parent.name.removeprefix("replay_") for file in path.glob(f"replay_[0-9]*/{REPLAY_BATCH}"))
    kept = sorted(int(name) for name in names if name.isdigit())
    if not kept:
        raise UserError(f"{path} has kept no step; a run with trainer.replay_freq=N keeps every N-th")
    if step == "latest":
        return path, kept[-1]
    if not step.isdigit() or int(step) not in kept:
        raise UserError(f"{path} has not kept step {step}; it has kept {', '.join(map(str, kept))}")
    return path, int(step)


def launcher() -> list[str]:
    """Return an identifier of this machine's torchrun: the folder that it made for its processes' errors.

    Not its count of restarts: where several machines take part, only that of the machine that failed counts.
    """
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # FOLDER/attempt_0/0/error.json
    return [f"{socket.gethostname()}:{folder}" for folder in file.parents[2:3]]


def begun_by(launchers: list[str], save_dir: Path) -> bool:
    """Return whether the run in `save_dir` belongs to these torchruns: they have restarted its processes.

    One machine in common is enough, as another may have taken the place of one that failed.
    """
    try:
        return not set(json.loads((save_dir / LAUNCHERS).read_text())).isdisjoint(launchers)
    except (OSError, ValueError, TypeError, RecursionError):
        return False  # of no run, or damaged: go on with trainer.load_ckpt_from=latest
