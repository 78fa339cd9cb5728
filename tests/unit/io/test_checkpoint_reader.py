"""Checkpoints that somebody has tampered with run nothing."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from RL2.io.checkpoint_reader import Reader, TensorPlanner


def save(folder: Path, state: dict[str, Any]) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=Reader(folder), planner=TensorPlanner(), no_dist=True)
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"model": {"a": torch.arange(6).view(2, 3).to(dtype)}, "step": torch.tensor(3.0)}
    empty = {"model": {"a": torch.zeros(2, 3, dtype=dtype)}, "step": torch.tensor(0.0)}
    assert str(load(save(tmp_path, state), empty)) == str(state)


class Hostile:
    """Makes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("depth", [0, 1])
def test_metadata_that_call_something_are_refused(depth: int, tmp_path: Path) -> None:
    folder, made = save(tmp_path / "state", {"a": torch.zeros(2)}), tmp_path / "made"
    metadata: Any = Hostile(made)
    if depth:
        metadata = Reader(folder).read_metadata()
        metadata.planner_data = {"a": Hostile(made)}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(dcp.CheckpointException, match=r"its metadata refer to pathlib\S*Path.touch"):
        load(folder, {"a": torch.zeros(2)})
    assert not made.exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert made.exists(), "it would have done nothing anyway"


def test_an_item_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "state", {"a": torch.zeros(2), "b": {1, 2}})
    with pytest.raises(dcp.CheckpointException, match="b is not a tensor"):
        load(folder, {"a": torch.zeros(2), "b": {1}})
