"""Output of a run for people: console lines, files of metrics, samples and tokens, and dashboards."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from RL2.errors import UserError, first_line
from RL2.io.durable import write_text
from RL2.io.jsonl import read_records, truncate_before
from RL2.io.progress import Progress, duration, time_of_day
from RL2.types import Trajectory

Metrics = dict[str, float]

RECORDS = ("metrics.jsonl", "samples.jsonl")
"""Files to which each step appends lines."""
SAMPLES_BEFORE = "samples.before.jsonl"
"""Older lines of samples.jsonl, moved here when that file reaches its limit."""
SUPERSEDED = ".superseded"
"""Suffix of the records of an earlier run in the same folder."""
TOKENS = "tokens"
"""Folder of per-token statistics."""
FIRST_ROWS = "first_rows.json"
"""File with the first rows that a run trains on; the tokens that train are marked."""
NUM_SHOWN = 5
"""Number of rows in `FIRST_ROWS`."""

CONSOLE = {
    "test/score": ("test", "{:.3f}"),
    "train/score": ("score", "{:.3f}"),
    "test/loss": ("test loss", "{:.4f}"),
    "test/accuracy": ("test accuracy", "{:.3f}"),
    "actor/loss": ("loss", "{:+.4f}"),
    "critic/loss": ("critic loss", "{:+.4f}"),
    "actor/accuracy": ("accuracy", "{:.3f}"),
    "critic/accuracy": ("accuracy", "{:.3f}"),
    "train/entropy": ("rollout entropy", "{:.3f}"),
    "actor/entropy": ("trained entropy", "{:.3f}"),
    "train/length": ("length", "{:.1f}"),
    "actor/grad_norm": ("grad", "{:.2f}"),
    "time/tokens_per_s": ("tok/s", "{:.0f}"),
    "time/step_s": ("s", "{:.1f}"),
}
"""Metric -> its name in the console line, and its format."""


SCORE_OF_SET = re.compile(r"test/(?!reward/|env/)([^/]+)/score")
"""Pattern of the metric with the score of a named test set."""


class RecordsFailed(UserError, RuntimeError):
    """A record of the run could not be written: the disk is full or read-only, or the folder is gone."""


class Dashboard(Protocol):
    """A receiver of metrics, such as wandb or TensorBoard."""

    def log(self, metrics: Metrics, step: int) -> None: ...

    def finish(self) -> None: ...


class Report:
    """Writer of a run's output on the first process; on other processes every method does nothing."""

    def __init__(
        self,
        folder: Path,
        is_first: bool,
        num_steps: int,
        dashboards: Iterable[Dashboard] = (),
        progress: Progress | None = None,
        limit_bytes: int = 4 << 30,
    ) -> None:
        """Set up the report of a run of `num_steps` steps.

        `limit_bytes` bounds the samples and token statistics on the disk.
        """
        self.limit_bytes = limit_bytes
        self.folder, self.is_first, self.num_steps, self.dashboards = folder, is_first, num_steps, list(dashboards)
        self.progress = progress or Progress(is_first)
        self.begun: tuple[int, float] | None = None
        """First step of this start, and its time by `time.monotonic`."""
        self.said: set[str] = set()

    def begin(self, step: int) -> None:
        """Record that `step`, the first of this start, begins now."""
        self.begun = step, time.monotonic()

    def keep_before(self, step: int) -> None:
        """Remove the records of `step` and later, and print a line about it; those steps run again.

        A run that begins at step 0 renames the records of an earlier one instead.
        """
        if not self.is_first:
            return
        with self._writing():
            self._cut_back(step)

    def _cut_back(self, step: int) -> None:
        metrics, samples, before, tokens = (self.folder / name for name in (*RECORDS, SAMPLES_BEFORE, TOKENS))
        later = [row["step"] for row in read_metrics(self.folder) if row["step"] >= step]
        if later:
            self.say(
                f"records of the steps {min(later)} to {max(later)} are "
                + ("cut off; these steps are run again" if step else f"set aside, in files with {SUPERSEDED}")
            )
        if step == 0:
            for path in filter(Path.exists, (metrics, samples, before, tokens)):
                aside = path.with_name(path.name + SUPERSEDED)
                if aside.is_dir():
                    shutil.rmtree(aside)
                path.replace(aside)
            return
        for file in tokens.glob("*.parquet"):
            if int(file.name.split("_")[0]) >= step:
                file.unlink()
        for file in filter(Path.exists, (metrics, samples, before)):
            truncate_before(file, step)

    def rows(self) -> list[dict[str, float]]:
        """Return the rows of metrics.jsonl, oldest first; empty on other processes than the first."""
        return read_metrics(self.folder) if self.is_first else []

    def step(self, step: int, metrics: Metrics) -> None:
        """Report one step's metrics: to the console, to metrics.jsonl and to the dashboards."""
        if not self.is_first:
            return
        shown = [f"{name} {form.format(metrics[key])}" for key, (name, form) in CONSOLE.items() if key in metrics]
        shown += [f"{found[1]} {metrics[key]:.3f}" for key in metrics if (found := SCORE_OF_SET.fullmatch(key))]
        if metrics.get("train/unscored"):
            shown.append(f"UNSCORED {metrics['train/unscored']:.0f}")
        shown.append(f"at {time_of_day()}")
        if self.begun is not None and self.begun[0] <= step < self.num_steps - 1:
            first, begun = self.begun
            left = (time.monotonic() - begun) / (step + 1 - first) * (self.num_steps - 1 - step)
            shown.append(f"left {duration(left)}")
        self.say(f"step {step}/{max(step, self.num_steps)}  " + "  ".join(shown))
        if odd := sorted(name for name, value in metrics.items() if not math.isfinite(value)):
            self.say(f"step {step}: WARNING: not recorded, because JSON has no such numbers: {_values(metrics, odd)}")
            metrics = {name: value for name, value in metrics.items() if name not in odd}
        self._append("metrics.jsonl", [{"step": step} | metrics])
        for dashboard in self.dashboards:
            dashboard.log(metrics, step)

    def first_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Store the rows that a run begins with, for `rl2 view`.

        Each row has a `name` and `pieces`: runs of its text, each with whether it trains.
        """
        if self.is_first:
            with self._writing():
                write_text(self.folder / FIRST_ROWS, json.dumps(list(rows), ensure_ascii=False) + "\n")

    def samples(self, step: int, split: str, trajectories: Iterable[Trajectory], test_set: str = "") -> None:
        """Append trajectories to samples.jsonl, a line each. `test_set` is the name of their test set, if any."""
        if not self.is_first:
            return
        keys = ("row", "group", "sample", "texts", "reward", "score", "truncated", "unscored", "num_tokens")
        named = ("role", "parts", "metrics")  # only where there are some
        rows = [
            {"step": step, "split": split}
            | ({"set": test_set} if test_set else {})
            | {k: getattr(t, k) for k in keys}
            | {k: getattr(t, k) for k in named if getattr(t, k)}
            | ({} if t.role is None or t.sequences else {"reward": None})  # nobody says what an opponent earned
            for t in trajectories
        ]
        self._append("samples.jsonl", rows)
        samples = self.folder / "samples.jsonl"
        with self._writing():
            if samples.exists() and samples.stat().st_size > self.limit_bytes / 4:
                samples.replace(self.folder / SAMPLES_BEFORE)
                self._say_bound("older samples than those in samples.jsonl and " + SAMPLES_BEFORE)

    def tokens(self, step: int, split: str, rows: list[dict[str, Any]]) -> None:
        """Write trajectories token by token to tokens/STEP_SPLIT.parquet, a row each; see docs/viewer.md."""
        if not self.is_first or not rows:
            return
        import pyarrow as pa
        from pyarrow import parquet

        file = self.folder / TOKENS / f"{step:06d}_{split}.parquet"
        schema = pa.schema(
            [("step", pa.int64()), ("split", pa.string())]
            + [(name, pa.int64()) for name in ("row", "group", "sample", "length")]
            + [("role", pa.string())]
            + [(name, pa.float64()) for name in ("reward", "score", "loss")]
            + [
                ("token_ids", pa.list_(pa.int32())),
                ("tokens", pa.list_(pa.string())),
                ("sampled", pa.list_(pa.bool_())),
            ]
            + [(name, pa.list_(pa.float32())) for name in ("logp", "max_logp", "entropy", "engine_logp")]
            + [(name, pa.list_(pa.float32())) for name in ("loss_T", "pull_T")]
            + [("rank", pa.list_(pa.int32()))]
            + [("top", pa.list_(pa.list_(pa.string()))), ("top_logp", pa.list_(pa.list_(pa.float32())))]
        )
        table = pa.Table.from_pylist([{"step": step, "split": split} | row for row in rows], schema)
        with self._writing():
            file.parent.mkdir(exist_ok=True)
            parquet.write_table(table, partial := file.with_suffix(".partial"), compression="zstd")
            partial.replace(file)  # readers see a complete file or none
            files = sorted(file.parent.glob("*.parquet"))
            sizes = [each.stat().st_size for each in files]
            for each, size in zip(files[:-1], list(accumulate(reversed(sizes)))[:0:-1], strict=True):
                if size > self.limit_bytes / 2:  # this file and all later ones
                    each.unlink()
                    self._say_bound(f"the oldest files of {TOKENS}/")

    def _say_bound(self, what: str) -> None:
        limit = f"trainer.records_mib={self.limit_bytes >> 20}"
        self.say_once(what, f"{what} are removed from now on: {limit} bounds them")

    def say(self, *lines: str) -> None:
        self.progress.say(*lines)

    def say_once(self, subject: str, line: str) -> None:
        """Print `line` unless a line of the same `subject` was printed before."""
        if subject not in self.said:
            self.said.add(subject)
            self.say(line)

    def close(self) -> None:
        for dashboard in self.dashboards:
            dashboard.finish()

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        with self._writing(), (self.folder / name).open("a", encoding="utf-8") as file:
            file.writelines(lines)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Convert an OSError in the `with` block to `RecordsFailed`."""
        try:
            yield
        except OSError as error:
            raise RecordsFailed(
                f"the records in {self.folder} could not be written ({first_line(error)}); make space and the "
                "folder writable, then resume with trainer.load_ckpt_from=latest"
            ) from error


def _values(metrics: Metrics, names: list[str]) -> str:
    return ", ".join(f"{name}={metrics[name]}" for name in names)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.jsonl, oldest first; an incomplete last line is left out."""
    return list(read_records(folder / "metrics.jsonl"))


class Wandb:
    """Weights & Biases dashboard; a resumed run continues under its id."""

    def __init__(self, folder: Path, project: str | None, name: str, config: dict[str, Any]) -> None:
        import wandb

        file = folder / "wandb_id"
        if not file.exists():
            file.write_text(wandb.util.generate_id())
        # the same id after an interruption, so that the run stays one
        self.run = wandb.init(
            project=project, name=name, dir=folder, config=config, id=file.read_text(), resume="allow"
        )

    def log(self, metrics: Metrics, step: int) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio dashboard, stored on this machine for `trackio show`."""

    def __init__(self, folder: Path, project: str | None, name: str, config: dict[str, Any]) -> None:
        import trackio

        # resume a run of this name only if it belongs to this folder
        begun = folder / "trackio"
        self.run = trackio.init(
            project=project or "RL2",
            name=name,
            config=config,
            resume="allow" if begun.exists() else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        begun.touch()

    def log(self, metrics: Metrics, step: int) -> None:
        self.run.log(metrics, step=step)

    def finish(self) -> None:
        self.run.finish()


class TensorBoard:
    """TensorBoard event files in the folder of the run."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / "tensorboard")

    def log(self, metrics: Metrics, step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()
