"""What every program does around its loop: processes, seed, folder, report, resume, save."""

from __future__ import annotations

import json
import os
import random
import shutil
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

from RL2 import checkpoint
from RL2.checkpoint import CheckpointFailed, Checkpoints, Resumable
from RL2.config import Config, ConfigError, LostProcess, RLTrainer, first_line, show
from RL2.config import Trainer as TrainerConfig
from RL2.data.cursor import Cursor
from RL2.parallel.processes import Processes
from RL2.report import Dashboard, Report, TensorBoard, Trackio, Wandb
from RL2.trainer.interrupt import Interrupt, Interrupted, listening
from RL2.types import TokenBatch
from RL2.workers.worker import Learner

REPLAY_BATCH = "batch.safetensors"
"""The rollouts of a step that is kept for replay, as they are trained on; the model lies beside them."""
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
    """What is to be closed when the run ends, however it ends."""
    launchers: list[str]
    """The torchruns of this run's processes, one for each machine; empty without torchrun."""
    interrupt: Interrupt

    def report(self, num_steps: int) -> Report:
        dashboards: list[Dashboard] = []
        if self.processes.is_first and self.config.use_wandb:
            dashboards.append(Wandb(self.save_dir, self.config.project, self.config.experiment_name, self.settings))
        if self.processes.is_first and self.config.use_trackio:
            dashboards.append(Trackio(self.save_dir, self.config.project, self.config.experiment_name, self.settings))
        if self.processes.is_first and self.config.use_tensorboard:
            dashboards.append(TensorBoard(self.save_dir))
        return Report(self.save_dir, self.processes.is_first, num_steps, dashboards)

    def listing(self) -> Path | None:
        """Return where rows that are skipped are listed, a new file; None on processes that do not write it."""
        file = self.save_dir / "skipped_rows.jsonl"
        if self.processes.is_first:
            file.unlink(missing_ok=True)
        return file if self.processes.is_first else None

    def resume(self, learner: Learner, cursor: Resumable, report: Report, critic: Learner | None = None) -> int:
        """Restore the checkpoint that the configuration names, if any; returns the step to begin with.

        Processes that torchrun has started again take the newest that the first ones wrote.
        """
        source = checkpoint.find("latest", self.save_dir) if begun_by(self.launchers, self.save_dir) else None
        source = source or checkpoint.find(self.config.load_ckpt_from, self.save_dir)
        step = 0
        if source is not None:
            with self.processes.expecting("the others in loading a checkpoint"):
                try:
                    step = checkpoint.load(source, learner, cursor, self.processes, critic)
                except ConfigError as error:
                    raise ConfigError(
                        f"{error}{differences(checkpoint.models(source), models(self.settings))}"
                    ) from error
            report.say(f"resumed from {source}: step {step}")
        report.keep_before(step)
        if self.processes.is_first:
            checkpoint.set_aside_after(self.save_dir, step)
            (self.save_dir / LAUNCHERS).write_text(json.dumps(self.launchers))  # from here on `latest` is of this run
        self.processes.wait("the report to be cut back")
        return step

    def save_if_due(
        self,
        step: int,
        learner: Learner,
        cursor: Resumable,
        tokenizer: PreTrainedTokenizerBase,
        critic: Learner | None = None,
    ) -> None:
        """A checkpoint to go on from at `step`, written while the run goes on, and the model as it is.

        Raises `Interrupted` after it if any process was asked to end.
        """
        ends = any(self.processes.gather([self.interrupt.is_asked], "whether the run goes on"))
        if ends or self.due(self.config.save_freq, step):
            self.checkpoints.save(step, learner, cursor, critic)
            self.export(learner, tokenizer, critic)
        if ends:
            self.checkpoints.finish()
            raise Interrupted(
                f"ended by Ctrl-C after step {step - 1}; go on with trainer.save_dir={self.save_dir} "
                "trainer.load_ckpt_from=latest"
            )

    def export(self, learner: Learner, tokenizer: PreTrainedTokenizerBase, critic: Learner | None = None) -> None:
        """The model in `save_dir/latest`, and a critic in `save_dir/critic`."""
        self.export_to("latest", learner, tokenizer)
        if critic is not None:
            self.export_to("critic", critic, tokenizer)

    def export_to(self, name: str, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> None:
        """A model in `save_dir/NAME`, as `from_pretrained` of its class in transformers loads it."""
        target, partial = self.save_dir / name, self.save_dir / f"{name}.partial"
        try:
            learner.export(tokenizer, partial)
        except (OSError, SafetensorError) as error:
            raise CheckpointFailed(f"the model could not be written into {partial}: {error}") from error
        if self.processes.is_first:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        self.processes.wait("the model to be written")

    def keep_for_replay(
        self, step: int, batch: TokenBatch, learner: Learner, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """The model, and the batch that it is going to train on, in `save_dir/replay_NNNNNN` (evaluation/replay.py)."""
        folder = replay_folder(self.save_dir, step)
        self.export_to(folder.name, learner, tokenizer)
        if self.processes.is_first:
            batch.save(folder / REPLAY_BATCH)

    def due(self, frequency: int | None, step: int) -> bool:
        return frequency is not None and step % frequency == 0


@contextmanager
def start(config: Config) -> Iterator[Run]:
    """Join the other processes, seed, and make the run's folder; leave in order."""
    trainer = config.trainer
    save_dir = Path(trainer.save_dir)
    # denormals are slow on CPUs and train nothing
    torch.set_flush_denormal(True)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    processes = Processes.start(trainer.timeout_s)
    try:
        random.seed(trainer.seed)
        torch.manual_seed(trainer.seed)
        launchers = sorted(set(processes.gather(launcher(), "all processes to say who started them")))
        is_test = isinstance(trainer, RLTrainer) and trainer.eval_only
        goes_on = not is_test and (trainer.load_ckpt_from is not None or begun_by(launchers, save_dir))
        if not goes_on:
            refuse_another_run(save_dir)
        processes.wait("all processes to look into trainer.save_dir")
        if processes.is_first:
            try:
                save_dir.mkdir(parents=True, exist_ok=True)
                (save_dir / "config.yaml").write_text(show(config))
            except OSError as error:
                raise ConfigError(f"trainer.save_dir={save_dir} cannot be written: {first_line(error)}") from error
        processes.wait("trainer.save_dir to be made")
        settings = asdict(config)
        checkpoints = Checkpoints(save_dir, processes, trainer.keep, models(settings))
        with ExitStack() as closing, listening() as interrupt:
            yield Run(trainer, save_dir, processes, checkpoints, settings, closing, launchers, interrupt)
        checkpoints.finish()
    except LostProcess:
        raise  # and leave: whoever still waits for this process will see that it has gone
    except BaseException:
        processes.stop()
        raise
    processes.stop()


def number_of_steps(trainer: TrainerConfig, cursor: Cursor) -> int:
    """`max_steps`, or as many as `n_epochs` give."""
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
            f"trainer.save_dir={save_dir} already holds a run; go on with it (trainer.load_ckpt_from=latest) "
            "or choose another trainer.save_dir"
        )


def models(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run's models began with, of its configuration; it stands in its checkpoints, for errors."""
    found = {f"{group}.model_name": settings[group]["model_name"] for group in ("actor", "critic") if group in settings}
    if "lora" in settings.get("actor", {}):
        found["actor.lora.rank"] = settings["actor"]["lora"]["rank"]
    return found


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """How the models of another run differ from those of this one, for the end of an error."""
    told = [
        f"{key}={their}, and here it is {ours[key]}" for key, their in theirs.items() if ours.get(key, their) != their
    ]
    return f"; its run had {' and '.join(told)}" if told else ""


def replay_folder(save_dir: Path, step: int) -> Path:
    return save_dir / f"replay_{step:06d}"


def launcher() -> list[str]:
    """What tells this machine's torchrun from any other: the folder that it made for its processes' errors.

    Not its count of restarts: where several machines take part, only that of the machine that failed counts.
    """
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # FOLDER/attempt_0/0/error.json
    return [f"{socket.gethostname()}:{folder}" for folder in file.parents[2:3]]


def begun_by(launchers: list[str], save_dir: Path) -> bool:
    """The run in `save_dir` is of these torchruns: they have started its processes again (`--max-restarts`).

    One machine in common is enough, as another may have taken the place of one that failed.
    """
    file = save_dir / LAUNCHERS
    if not file.exists():
        return False
    try:
        return not set(json.loads(file.read_text())).isdisjoint(launchers)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged ({first_line(error)}); remove it") from error
