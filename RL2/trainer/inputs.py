"""Inputs of a run: settings, files, code. Digests tell whether two processes, or two starts, have the same."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from RL2.models.loading import folder_here
from RL2.parallel.agree import refuse_differences
from RL2.parallel.fsdp import local
from RL2.parallel.processes import Processes
from RL2.types import Prompt
from RL2.workers.learner import Learner

NOT_READ = ("trainer.save_dir", "trainer.load_ckpt_from", "trainer.experiment_name", "trainer.project")
"""Settings whose value may be the name of something on the disk that is no input."""
WHOLE, SAMPLES, SAMPLE = 2**26, 64, 2**16
"""Bytes up to which a file is read whole; of a larger one so many pieces of so many bytes are read, and its size."""
SUFFIXES = {".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".csv", ".parquet", ".arrow"}
MOST_FILES = 1000
ROWS = 256
"""Rows of a data set that are compared, and their number."""


def facts(settings: Mapping[str, Any], *, files: bool) -> dict[str, str]:
    """Return every setting, and with `files` the digests of the files that they name, and of the code."""
    found = dict(_flat(settings, ""))
    if not files:
        return found
    named = {f"the content of {key}": _content(value) for key, value in found.items() if key not in NOT_READ}
    packages = {name: _version(name) for name in ("torch", "transformers", "tokenizers")}
    named["the code of RL2"] = _digest(Path(__file__).parents[1].rglob("*.py"))
    known = {key: value for key, value in named.items() if value is not None}
    return found | known | packages | {"Python": platform.python_version()}


def changed(before: Path, shown: str) -> list[str]:
    """Return the settings of the YAML `shown` that the file `before` has otherwise, a phrase each."""
    try:
        old, new = (
            dict(_flat(OmegaConf.to_container(each), "")) for each in (OmegaConf.load(before), OmegaConf.create(shown))
        )
    except Exception:  # a file that is missing, or edited by hand; nothing depends on it
        return []
    return [
        f"{key}={new[key]} (before: {old[key]})"
        for key in new
        if key not in NOT_READ and new[key] != old.get(key, new[key])
    ]


def of_prompts(prompts: Sequence[Prompt]) -> str:
    """Return the number of some prompts and a digest of a part of them."""
    chosen = [prompts[i] for i in evenly_spaced(len(prompts))]
    content = [(prompt.text, list(map(int, prompt.token_ids)), prompt.extra_info) for prompt in chosen]
    return f"{len(prompts)} rows {hashlib.sha256(repr(content).encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def of_tensors(num_rows: int, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the number of rows and a digest of what was drawn of them."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(_bytes(tensors[name]))
    return f"{num_rows} rows {found.hexdigest()[:12]}"


def evenly_spaced(number: int) -> list[int]:
    """Return up to `ROWS` numbers below `number`, evenly spaced, first and last among them."""
    if number <= ROWS:
        return list(range(number))
    return [(number - 1) * place // (ROWS - 1) for place in range(ROWS)]


def refuse_other_replicas(processes: Processes, learner: Learner, name: str) -> None:
    """Raise ConfigError unless replicas of a model have the same weights, bit by bit (collective)."""
    if learner.config.ddp_size == 1:
        return
    found = hashlib.sha256()
    for parameter in learner.policy.parameters():
        found.update(_bytes(local(parameter.detach())))
    mesh = learner.mesh
    shard = mesh.shards.get_local_rank("shards"), 0 if mesh.tp is None else mesh.tp.get_local_rank()
    refuse_differences(processes, {f"the weights of {name}, part {shard}": found.hexdigest()[:12]})


def _flat(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _flat(each, f"{key}.{name}" if key else str(name))
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)


def _content(value: str) -> str | None:
    """Return a digest of the file or folder that a setting names, as a path, SPLIT@PATH, PATH:NAME or on the hub."""
    without_split = value.partition("@")[2]
    for name in (value, value.rpartition(":")[0], without_split, without_split.rpartition(":")[0]):
        path = Path(name)
        try:
            if path.is_file():
                return _digest([path])
            if name and path.is_dir():
                return _digest(_relevant(path))
        except (OSError, ValueError):  # no path at all
            continue
    try:
        folder = folder_here(value) if value.count("/") == 1 else None
    except ValueError:
        return None
    return None if folder is None else _digest(_relevant(folder))


def _relevant(folder: Path) -> list[Path]:
    """Return the files of a model or a data set, and not what a download left beside them."""
    found = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(found)[:MOST_FILES]


def _digest(files: Iterable[Path]) -> str | None:
    """Return a digest of some files, in the order of their paths; None if one cannot be read."""
    found = hashlib.sha256()
    try:
        for file in sorted(files):
            found.update(file.name.encode("utf-8", "surrogateescape") + _pieces(file))
    except OSError:
        return None  # whoever needs it will say so
    return found.hexdigest()[:12]


def _pieces(file: Path) -> bytes:
    """Return the digest of a file's size and content, or of pieces of it if it is large."""
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= WHOLE:
            return hashlib.file_digest(content, "sha256").digest()
        found = hashlib.sha256(str(size).encode())
        for place in range(SAMPLES):
            content.seek((size - SAMPLE) * place // (SAMPLES - 1))
            found.update(content.read(SAMPLE))
    return found.digest()


def _bytes(x: torch.Tensor) -> memoryview:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
