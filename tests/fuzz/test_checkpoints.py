"""Damaged checkpoints are refused in one line; which one is newest or best is found among whatever lies there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import clear, inputs, mangled, shaken, values
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from RL2.data.curriculum import Curriculum
from RL2.errors import ConfigError
from RL2.io import checkpoint
from RL2.io.checkpoint import NOTES, RANDOM, STATE, Checkpoints
from RL2.parallel.processes import Processes
from RL2.trainer.run import LAUNCHERS, begun_by

METADATA = f"{STATE}/.metadata"


class Tiny:
    kept_model = None

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.steps, self.policy = 7, nn.Linear(2, 2)
        self.optimizer = torch.optim.AdamW(self.policy.parameters())
        self.policy(torch.ones(2)).sum().backward()
        self.optimizer.step()


def cursor() -> Curriculum:
    made = Curriculum(10, 4, 0, "failures")
    made.learn({3: 0.5})
    made.next()
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, processes: Processes) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder, processes)
    checkpoints.save(5, Tiny(), cursor())
    checkpoints.finish()
    return folder / "step_000005"


@pytest.mark.parametrize(("name", "share"), [(NOTES, 0.02), (RANDOM, 0.005), (METADATA, 0.01), (STATE, 0.005)])
def test_damaged_files(name: str, share: float, saved: Path, processes: Processes, tmp_path: Path) -> None:
    shutil.copytree(saved, folder := tmp_path / "step_000005")
    (file,) = (folder / STATE).glob("*.distcp") if name == STATE else [folder / name]
    valid = file.read_bytes()
    notes = json.loads((saved / NOTES).read_text())
    shaken_notes = shaken(notes).map(lambda value: json.dumps(value).encode())
    learner, own = Tiny(), cursor()

    @inputs(share)
    @given(mangled(valid) | shaken_notes if name == NOTES else mangled(valid))
    def use(data: bytes) -> None:
        file.write_bytes(data)
        with clear():
            step = checkpoint.load(folder, learner, own, processes)
            assert type(step) is int and step >= 0 and type(learner.steps) is int and learner.steps >= 0
            assert own.drawn >= 0 and len(own.next()) == 4
        with clear():
            checkpoint.load_weights(folder, learner.policy)

    use()
    file.write_bytes(valid)
    assert checkpoint.load(folder, learner, own, processes) == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (NOTES, b"{"),
        (NOTES, b"[]"),
        (NOTES, b'{"step": 5, "optimizer_steps": "7", "cursor": {}}'),
        (RANDOM, b""),
        (METADATA, b"\x80\x04"),
    ],
)
def test_what_was_found(name: str, content: bytes, saved: Path, processes: Processes, tmp_path: Path) -> None:
    """Each by itself; `rl2 export` reads the metadata alone."""
    shutil.copytree(saved, folder := tmp_path / "step_000005")
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"step_000005.* (is damaged|cannot be loaded): "):
        checkpoint.load(folder, Tiny(), cursor(), processes)
    if name == METADATA:
        with pytest.raises(ConfigError, match="step_000005 cannot be loaded: "):
            checkpoint.load_weights(folder, Tiny().policy)


folders = st.lists(
    st.sampled_from(
        ["step_000001", "step_000002", "step_x", "step_", "step_-1", "step_000003.partial", "step_9 9", "best"]
    )
    | st.from_regex(r"step_[0-9a-z._-]{0,8}", fullmatch=True),
    max_size=5,
    unique=True,
)
metrics = st.lists(shaken({"step": 1, "test/score": 0.5}) | values, max_size=3)


@inputs(0.01)
@given(folders, metrics, st.sampled_from(["latest", "best", "nowhere"]))
def test_which_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], rows: list[Any], wanted: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "which"
    shutil.rmtree(folder, ignore_errors=True)
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / NOTES).write_text("{}")
    folder.mkdir(exist_ok=True)
    try:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    except (ValueError, RecursionError):
        text = "[\n"
    (folder / "metrics.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    with clear():
        assert all(checkpoint.step_of(path) >= 0 for path in checkpoint.candidates(wanted, folder))
        checkpoint.set_aside_after(folder, 1)
        checkpoint.prune(folder, 1)
        assert not (folder / "step_000002").exists() or "step_000002" not in names


@inputs(0.01)
@given(mangled(b'["host:/tmp/x"]', b"[]"))
def test_launchers(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / LAUNCHERS).write_bytes(data)
    with clear():
        assert begun_by(["host:/tmp/x"], folder) in (True, False)
