"""A checkpoint whose files are not as they were written is named and passed over, whatever happened to them."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from RL2.data.cursor import Cursor
from RL2.errors import ConfigError
from RL2.io import checkpoint
from RL2.io.checkpoint import CheckpointFailed, Checkpoints
from RL2.parallel.processes import Processes

DAMAGES = 200


class Small:
    """What a checkpoint asks of a learner."""

    kept_model = None

    def __init__(self, value: float = 0.0) -> None:
        self.policy = nn.Linear(3, 5)
        nn.init.constant_(self.policy.weight, value)
        self.optimizer = torch.optim.AdamW(self.policy.parameters())
        self.steps = 0
        self.policy(torch.ones(3)).sum().backward()
        self.optimizer.step()

    @property
    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.policy.parameters()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, processes: Processes) -> Path:
    """The folder of a run with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, processes)
    for step in (2, 4):
        checkpoints.save(step, Small(step), Cursor(10, 4, 0))
    checkpoints.finish()
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run, and its newest checkpoint, which is to be damaged."""
    shutil.copytree(run, copy := tmp_path / "run")
    return copy, copy / "step_000004"


def test_flipped_bits_and_cut_files_are_passed_over(damaged: tuple[Path, Path], processes: Processes) -> None:
    folder, newest = damaged
    draw, expected = random.Random(0), Small()
    checkpoint.load(newest, expected, Cursor(10, 4, 0), processes)
    for _ in range(DAMAGES):
        file = draw.choice(files(newest))
        whole = file.read_bytes()
        content = bytearray(whole)
        if draw.random() < 0.5:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(content)) :]
        file.write_bytes(content)
        source, faults = checkpoint.choose("latest", folder, processes)
        if source == newest:  # white space of the digests, or a name in them that stands there twice
            assert file.name == "digests.json"
            loaded = Small()
            checkpoint.load(source, loaded, Cursor(10, 4, 0), processes)
            assert all(map(torch.equal, loaded.weights, expected.weights))
        else:
            assert source == folder / "step_000002"
            assert len(faults) == 1 and faults[0].startswith(f"{newest} is damaged: ")
        file.write_bytes(whole)
    assert checkpoint.choose("latest", folder, processes) == (newest, [])


@pytest.mark.parametrize(
    "name", ["notes.json", "random.safetensors", "digests.json", "state/.metadata", "state/*.distcp"]
)
def test_missing_files_and_what_is_no_file(name: str, damaged: tuple[Path, Path], processes: Processes) -> None:
    folder, newest = damaged
    (file,) = newest.glob(name)
    file.unlink()
    found = checkpoint.choose("latest", folder, processes)
    assert found == (folder / "step_000002", [f"{newest} is damaged: {file.relative_to(newest)} is missing"])
    os.mkfifo(file)  # nobody ever writes into it
    if name != "digests.json":
        assert checkpoint.choose("latest", folder, processes) == found


def test_no_whole_checkpoint_is_no_start_from_the_beginning(damaged: tuple[Path, Path], processes: Processes) -> None:
    folder, newest = damaged
    for notes in folder.glob("*/notes.json"):
        notes.write_bytes(b"")
    with pytest.raises(ConfigError, match=re.escape(f"{folder}/step_000002 is damaged: notes.json is not as")):
        checkpoint.choose("latest", folder, processes)
    with pytest.raises(ConfigError, match=re.escape(f"load_ckpt_from={newest}: {newest} is damaged: notes.json")):
        checkpoint.choose(str(newest), folder, processes)


def test_all_of_a_checkpoint_is_on_the_disk_when_it_gets_its_name(
    tmp_path: Path, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, unsynced, fsync, rename = set[int](), list[str](), os.fsync, Path.rename

    def seen_fsync(handle: int) -> None:
        fsync(handle)
        synced.add(os.fstat(handle).st_ino)

    def seen_rename(self: Path, target: Path) -> Path:
        if self.is_dir():
            parts = [self, *self.rglob("*"), self.parent / "metrics.jsonl"]
            unsynced.extend(part.name for part in parts if part.stat().st_ino not in synced)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "rename", seen_rename)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    checkpoints = Checkpoints(tmp_path, processes)
    checkpoints.save(1, Small(), Cursor(10, 4, 0))
    checkpoints.finish()
    assert (tmp_path / "step_000001").is_dir()
    assert unsynced == []
    assert tmp_path.stat().st_ino in synced


def test_a_folder_that_cannot_be_written_fails_the_checkpoint(tmp_path: Path, processes: Processes) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(
        CheckpointFailed, match=r"the checkpoint of step 1 could not be written into .*/run \(.+\); resume"
    ):
        Checkpoints(tmp_path / "run", processes).save(1, Small(), Cursor(10, 4, 0))
