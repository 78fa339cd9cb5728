"""Index of runs for `rl2 view`, packed so that a browser unpacks only what it shows.

Everything is JSON in chunks, each deflated separately and encoded in base64, which is safe in HTML. `head` has the
runs, their curves, and a column for each sort key of rollouts. `text-N` and `token-N` have the texts of rollouts and
the statistics of their tokens, about `CHUNK` characters each. Files only grow during a run, so `refresh` reads what is
new and packs only the last chunks again.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pyarrow import parquet
from safetensors.numpy import load_file

from RL2.errors import UserError, first_line
from RL2.io.jsonl import JsonlTail
from RL2.io.report import FIRST_ROWS, SAMPLES_BEFORE, TOKENS

CHUNK = 1 << 17
"""Number of characters after which a chunk is full."""
OWN = (
    *("seed", "project", "experiment_name", "load_ckpt_from", "save_dir", "save_freq", "keep", "keep_best"),
    *("samples_per_step", "records_mib", "replay_freq", "token_stats_freq", "timeout_s", "dry_run"),
    *("use_wandb", "use_trackio", "use_tensorboard"),
)
"""Keys of `trainer` that may differ between runs of one method: the seed, and what is written where."""
NOTHING = 1e-3
"""Share of the largest loss or gradient weight of a step's tokens below which a value is shown as 0."""
COLUMNS = ("run", "step", "split", "row", "group", "sample", "role", "reward", "length", "loss", "mark", "token")
"""Columns of the index: a number or null for each rollout."""
SPLITS = ("train", "test")
LARGEST = sys.float_info.max
LONGEST = 20_000
"""Limit in characters of each piece of text in the first rows."""
TRUNCATED, UNSCORED = 1, 2
"""Bits of the column `mark`."""


def encoded(value: Any) -> str:
    """Return `value` as JSON, deflated without a header, in base64."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    # a lone surrogate, which no run writes, becomes a question mark
    data = packer.compress(text.encode("utf-8", "replace")) + packer.flush()
    return base64.b64encode(data).decode("ascii")


class ChunkedList:
    """Append-only list, packed in chunks."""

    def __init__(self) -> None:
        self.full: list[str] = []
        self.starts = [0]
        """Index of the first item of each chunk."""
        self.rest: list[Any] = []
        self.room = CHUNK

    def __len__(self) -> int:
        return self.starts[-1] + len(self.rest)

    def add(self, item: Any, size: int) -> None:
        """Append an item of about `size` characters."""
        self.rest.append(item)
        self.room -= size
        if self.room <= 0:
            self.full.append(encoded(self.rest))
            self.starts.append(len(self))
            self.rest, self.room = [], CHUNK

    def chunks(self) -> Iterator[str]:
        yield from self.full
        yield encoded(self.rest)


@dataclass
class RunFiles:
    """Data read so far from one run."""

    name: str
    folder: Path
    method: int
    metrics: JsonlTail
    before: JsonlTail
    """Older samples."""
    samples: JsonlTail
    curves: dict[str, list[list[Any]]] = field(default_factory=dict)
    """Metric -> steps and values."""
    rollouts: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """(step, split, row, group, sample, role) -> number in the index."""
    token_files: set[str] = field(default_factory=set)
    first_rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows that the run trains on: a name, and pieces of text with whether they train."""
    replays: dict[int, dict[bytes, dict[str, list[float]]]] = field(default_factory=dict)
    """Step -> token ids of a sequence -> objective -> a number for each action."""
    credits: dict[int, dict[bytes, dict[str, Any]]] = field(default_factory=dict)
    """Step -> token ids of an answer -> what `rl2 credit` measured."""

    @property
    def replay_files(self) -> list[Path]:
        return sorted(self.folder.glob("replay_[0-9]*/replay.json"))

    @property
    def credit_files(self) -> list[Path]:
        return sorted(self.folder.glob("replay_[0-9]*/credit.json"))


class RunIndex:
    """Index of runs and of everything that they have written so far."""

    def __init__(self, named: Sequence[str]) -> None:
        """Read the runs in `named`: folders, or NAME=FOLDER,FOLDER... for seeds of one method.

        Folders whose configurations differ only in the seed are also seeds of one method. Raise UserError if a folder
        is not a run.
        """
        self.named = list(named)
        self.version = 0
        self._open()
        self.refresh()

    def _open(self) -> None:
        self.methods, groups = _methods(self.named)
        folders = [folder for group in groups for folder in group]
        names = _names(folders)
        self.runs = [
            RunFiles(
                names[folder],
                folder,
                method,
                JsonlTail(folder / "metrics.jsonl"),
                JsonlTail(folder / SAMPLES_BEFORE),
                JsonlTail(folder / "samples.jsonl"),
            )
            for method, group in enumerate(groups)
            for folder in group
        ]
        self.columns: dict[str, list[float | None]] = {name: [] for name in COLUMNS}
        self.roles: list[str] = []
        """Names of roles; the column `role` has their places."""
        self.texts, self.tokens = ChunkedList(), ChunkedList()
        self.seen_replays: set[Path] = set()

    def refresh(self) -> bool:
        """Read what is new, and return whether there was anything."""
        replays = {file for run in self.runs for file in (*run.replay_files, *run.credit_files)}
        cut_back = any(lines.is_another for run in self.runs for lines in (run.metrics, run.before, run.samples))
        if cut_back or (self.version and replays != self.seen_replays):
            self._open()
        self.seen_replays = replays
        news = [self._read(number, run) for number, run in enumerate(self.runs)]
        self.version += any(news) or cut_back
        return any(news) or cut_back

    def _read(self, number: int, run: RunFiles) -> bool:
        found = False
        for row in run.metrics.new():
            found = True
            step = row.pop("step")
            for name, value in row.items():
                if (value := _finite(value)) is not None:
                    steps, values = run.curves.setdefault(name, [[], []])
                    steps.append(step)
                    values.append(_short(value, 6))
        if not run.first_rows and (run.folder / FIRST_ROWS).exists():
            with _readable(run.folder / FIRST_ROWS):
                run.first_rows = _first_rows(run.folder / FIRST_ROWS)
                found = True
        for samples in (run.before, run.samples):
            for row in samples.new():
                found = True
                with _readable(samples.file):
                    self._add(number, run, row)
        for file in sorted(run.folder.glob(f"{TOKENS}/*.parquet")):
            # samples.jsonl is read first: rollouts that it lacks come with a later refresh
            if file.name not in run.token_files:
                with _readable(file):
                    found |= self._add_tokens(run, file)
        return found

    def _add(self, number: int, run: RunFiles, row: dict[str, Any]) -> None:
        if not all(isinstance(text, str) for text in row["texts"]) or not isinstance(row.get("unscored"), str | None):
            raise TypeError("texts must be strings")
        run.rollouts[_key(row)] = len(self.texts)
        role = str(row.get("role") or "")
        if role and role not in self.roles:
            self.roles.append(role)
        values = {
            "run": number,
            "step": row["step"],
            "split": SPLITS.index(row["split"]),
            "row": _finite(row["row"]),
            "group": _finite(row.get("group")),
            "sample": _finite(row.get("sample")),
            "role": self.roles.index(role) if role else None,
            "reward": None if row.get("unscored") else _finite(row["reward"]),
            "length": _finite(row.get("num_tokens")),
            "loss": None,
            "mark": TRUNCATED * bool(row.get("truncated")) + UNSCORED * bool(row.get("unscored")),
            "token": None,
        }
        for name, column in self.columns.items():
            column.append(values[name])
        named = {
            name: {str(key): _finite(value) for key, value in dict(row[name]).items()}
            for name in ("parts", "metrics")
            if row.get(name)
        }
        item = {
            "texts": row["texts"],
            "role": role,
            "unscored": row.get("unscored"),
            "set": str(row.get("set") or ""),
            **named,
        }
        self.texts.add(item, sum(map(len, row["texts"])) + 32)

    def _add_tokens(self, run: RunFiles, file: Path) -> bool:
        rows = parquet.read_table(file).to_pylist()
        if not all(_key(row) in run.rollouts for row in rows):
            return False
        run.token_files.add(file.name)
        # colours are relative to a rollout's own largest value, unless that is negligible in its step
        floors = {
            name: NOTHING * max((abs(x) for row in rows for x in row[column] or () if math.isfinite(x)), default=0.0)
            for name, column in (("loss", "loss_T"), ("pull", "pull_T"))
        }
        for row in rows:
            place = run.rollouts[_key(row)]
            self.columns["loss"][place] = None if row["loss"] is None else _short(row["loss"], 5)
            self.columns["length"][place] = row["length"]
            self.columns["token"][place] = len(self.tokens)
            trains = row["split"] == "train"
            replayed, credit = (self._replayed(run, row), self._credit(run, row)) if trains else ({}, None)
            self.tokens.add(
                _token_item(row, replayed) | {"floors": floors, "credit": credit},
                100 * row["length"] + 8 * len(row["tokens"]),
            )
        return True

    def _replayed(self, run: RunFiles, row: dict[str, Any]) -> dict[str, list[float]]:
        """Return the results of `rl2 replay` for a rollout: objective -> a number for each of its actions."""
        file = run.folder / f"replay_{row['step']:06d}" / "replay.json"
        if not file.exists():
            return {}
        if row["step"] not in run.replays:
            with _readable(file):
                run.replays[row["step"]] = _replay(file)
        return run.replays[row["step"]].get(np.asarray(row["token_ids"], np.int64).tobytes(), {})

    def _credit(self, run: RunFiles, row: dict[str, Any]) -> dict[str, Any] | None:
        """Return the results of `rl2 credit` for a rollout; None if there are none."""
        file = run.folder / f"replay_{row['step']:06d}" / "credit.json"
        if not file.exists():
            return None
        if row["step"] not in run.credits:
            with _readable(file):
                run.credits[row["step"]] = _credits(file)
        return run.credits[row["step"]].get(np.asarray(row["token_ids"], np.int64).tobytes())

    def chunks(self) -> Iterator[tuple[str, str]]:
        """Yield name and content of each chunk; `head` first."""
        yield "head", self.head()
        yield from ((f"text-{n}", chunk) for n, chunk in enumerate(self.texts.chunks()))
        yield from ((f"token-{n}", chunk) for n, chunk in enumerate(self.tokens.chunks()))

    def chunk(self, name: str) -> str | None:
        """Return the content of one chunk; None if there is no such chunk."""
        if name == "head":
            return self.head()
        kind, _, number = name.partition("-")
        chunked = {"text": self.texts, "token": self.tokens}.get(kind)
        if chunked is None or not number.isascii() or not number.isdigit() or int(number) >= len(chunked.starts):
            return None
        return [*chunked.full, ""][int(number)] or encoded(chunked.rest)

    def head(self) -> str:
        return encoded(
            {
                "version": self.version,
                "methods": self.methods,
                "runs": [
                    {"name": run.name, "method": run.method, "curves": run.curves, "rows": run.first_rows}
                    for run in self.runs
                ],
                "settings": _differences({run.name: _flat(_config(run.folder)) for run in self.runs}),
                "replays": [
                    {"run": number, **table}
                    for number, run in enumerate(self.runs)
                    for table in map(_replay_table, run.replay_files)
                ],
                "credits": [
                    {"run": number, **_agreement(file)}
                    for number, run in enumerate(self.runs)
                    for file in run.credit_files
                ],
                "columns": self.columns,
                "roles": self.roles,
                "texts": self.texts.starts,
                "tokens": self.tokens.starts,
            }
        )


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Convert any error in the `with` block to a UserError that names `file`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{file} was not written by a run ({type(error).__name__}: {first_line(error)}); remove or repair it"
        ) from error


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    place = (row["step"], SPLITS.index(row["split"]), row["row"], row.get("group", 0), row.get("sample", 0))
    return (*place, row.get("role") or "")


def _finite(value: Any) -> float | None:
    """Return `value` if it is a number that browsers can represent."""
    return value if isinstance(value, int | float) and -LARGEST <= value <= LARGEST else None


def _short(value: float, digits: int = 4) -> float | None:
    """Round to significant digits, more than visible at half the size; return None for a number that is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _shorts(values: Sequence[float], digits: int = 4) -> list[float | None]:
    return [_short(value, digits) for value in values]


def _token_item(row: dict[str, Any], replayed: dict[str, list[float]]) -> dict[str, Any]:
    """Return a rollout token by token; lists except the first two have an entry per sampled token."""
    logps, engine = row["logp"], row["engine_logp"]
    gap = None if engine is None else [_short(a - b, 3) for a, b in zip(logps, engine, strict=True)]
    loss = row["loss_T"]
    return {
        "tokens": row["tokens"],
        "sampled": "".join("01"[sampled] for sampled in row["sampled"]),
        "logp": _shorts(logps),
        "max_logp": _shorts(row["max_logp"]),
        "rank": row["rank"],
        "entropy": _shorts(row["entropy"]),
        "gap": gap,
        "loss": None if loss is None else _shorts(loss),
        "pull": None if loss is None else _shorts(row["pull_T"]),
        "top": row["top"],
        "top_logp": [_shorts(top, 3) for top in row["top_logp"]],
        "replay": {title: _shorts(values) for title, values in replayed.items()},
    }


def _first_rows(file: Path) -> list[dict[str, Any]]:
    """Return the rows of the file; long pieces of text are abridged in the middle."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [
        {"name": str(row["name"]), "pieces": [[_abridged(str(text)), bool(trains)] for text, trains in row["pieces"]]}
        for row in rows
    ]


def _abridged(text: str) -> str:
    left_out = len(text) - LONGEST
    return text if left_out <= 0 else f"{text[: LONGEST // 2]} [{left_out} characters] {text[-LONGEST // 2 :]}"


def _replay(file: Path) -> dict[bytes, dict[str, list[float]]]:
    """Return token ids of each sequence -> objective -> the weight of each of its actions."""
    replay = json.loads(file.read_text(encoding="utf-8"))
    batch = load_file(file.with_name("batch.safetensors"))
    starts = batch["cu_seqlens"].tolist()
    # number of actions before each position: where a sequence's numbers start
    before = np.concatenate([[0], batch["action_T"].cumsum()])
    found: dict[bytes, dict[str, list[float]]] = {}
    for a, b in pairwise(starts):
        ids = np.append(batch["token_ids_T"][a:b], batch["labels_T"][b - 1]).astype(np.int64)
        found[ids.tobytes()] = {one["title"]: one["weight_N"][before[a] : before[b]] for one in replay["objectives"]}
    return found


def _replay_table(file: Path) -> dict[str, Any]:
    """Return the results of `rl2 replay` for a table."""
    with _readable(file):
        replay = json.loads(file.read_text(encoding="utf-8"))
        shown = ("loss", "norm", "tokens", "entropy", "correct", "wrong")
        objectives = [
            {"title": str(one["title"]), **{name: _finite(one[name]) for name in shown}} for one in replay["objectives"]
        ]
        cosines = [
            {"of": str(one["of"]), "and": str(one["and"]), "cosine": _finite(one["cosine"])}
            for one in replay["cosines"]
        ]
        return {"step": int(replay["step"]), "objectives": objectives, "cosines": cosines}


def _credits(file: Path) -> dict[bytes, dict[str, Any]]:
    """Return token ids of each answer -> what the page shows of its credit; a bound has value, low and high."""
    credit = json.loads(file.read_text(encoding="utf-8"))
    found = {}
    for one in credit["answers"]:
        others = [
            {
                "at": int(other["at"]),
                "text": str(other["text"]),
                "advantage": _shorts(other["advantage"]),
                "number": int(other["number"]),
                "examples": [
                    {"text": str(each["text"]), "reward": _finite(each["reward"])} for each in other["examples"]
                ],
            }
            for other in one["alternatives"]
        ]
        found[np.asarray(one["token_ids"], np.int64).tobytes()] = {
            "rewards": _shorts(credit["rewards"]),
            "reward": _finite(one["reward"]),
            "advantage": [_shorts(bounds) for bounds in one["advantage"]],
            "value": [_shorts(bounds) for bounds in one["value"]],
            "number": [int(number) for number in one["number"]],
            "alternatives": others,
            "pulls": {str(title): _shorts(pulls) for title, pulls in one["pulls"].items()},
        }
    return found


def _agreement(file: Path) -> dict[str, Any]:
    """Return the table of a step's credit: how well objectives and rules agree with it."""
    with _readable(file):
        credit = json.loads(file.read_text(encoding="utf-8"))
        measures = ("rank", "signed", "share", "sign")
        rows = [
            {"title": str(row["title"]), "random": _finite(row["random"])}
            | {name: row[name] and _shorts(row[name]) for name in measures if name in row}
            for row in credit["agreement"]
        ]
        return {"step": int(credit["step"]), "agreement": rows}


def _methods(named: Sequence[str]) -> tuple[list[str], list[list[Path]]]:
    """Return the names of the methods, and the folders of each."""
    pairs = [(name, "", "") if Path(name).is_dir() else name.partition("=") for name in named]
    groups: dict[str, list[Path]] = {}
    for name, equals, paths in pairs:
        if equals:
            groups.setdefault(name, []).extend(Path(path) for path in paths.split(",") if path)
    alike: dict[str, list[Path]] = {}
    for path in [Path(name) for name, equals, _ in pairs if not equals]:
        config = _config(path)
        for key in OWN:
            config.get("trainer", {}).pop(key, None)
        alike.setdefault(json.dumps(config, sort_keys=True, default=str) if config else str(path), []).append(path)
    everything = [folder for group in (*groups.values(), *alike.values()) for folder in group]
    for folder in everything:
        if not any((folder / name).exists() for name in ("metrics.jsonl", "config.yaml", "samples.jsonl")):
            raise UserError(f"{folder} holds no run: it has neither config.yaml nor metrics.jsonl")
    if twice := {folder for folder in everything if everything.count(folder) > 1}:
        raise UserError(f"{min(twice)} is named twice")
    names = _names([folder for group in alike.values() for folder in group])
    for folders in alike.values():
        letters = zip(*(names[folder] for folder in folders), strict=False)
        title = "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, letters))
        # "spo-0" and "spo-1" become "spo"
        name = re.sub(r"[-_ /.]*(seed|s)?[-_ ]*$", "", title) if len(folders) > 1 else title
        groups.setdefault(name or names[folders[0]], []).extend(folders)
    return list(groups), list(groups.values())


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Return the shortest names that distinguish the folders."""
    parts = {folder: folder.resolve().parts for folder in folders}
    for length in range(1, max(map(len, parts.values()), default=1) + 1):
        names = {folder: "/".join(path[-length:]) for folder, path in parts.items()}
        if len(set(names.values())) == len(folders):
            break
    return names


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    if not file.exists():
        return {}
    with _readable(file):
        text = file.read_text(encoding="utf-8")
        # runs write no aliases, and a few lines of them can expand to gigabytes
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ValueError("it has aliases")
        config = json.loads(json.dumps(yaml.safe_load(text) or {}, default=str))  # this makes all keys strings
        if not isinstance(config, dict) or not isinstance(config.get("trainer", {}), dict):
            raise TypeError("it is not a configuration")
        return config


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found


def _differences(settings: dict[str, dict[str, str]]) -> dict[str, list[str]]:
    """Return key -> value in each run, for the keys that differ."""
    keys = list(dict.fromkeys(key for values in settings.values() for key in values))
    table = {key: [values.get(key, "") for values in settings.values()] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}
