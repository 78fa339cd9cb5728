"""A start that is refused has written nothing into the folder of the run that is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from RL2.config.load import load, show
from RL2.errors import ConfigError
from RL2.io import digests
from RL2.io.run_lock import RunLock
from RL2.trainer.inputs import changed
from RL2.trainer.launch import _is_out_of_memory
from RL2.trainer.run import LAUNCHERS, launcher, models, start

LORA = ("actor.lora.rank=4", "actor.lora.alpha=8")


def config(folder: Path, *overrides: str) -> Any:
    common = ["actor.model_name=base", "actor.max_length_per_device=9999", "data.path=x.jsonl", "data.max_length=99"]
    common += ["data.batch_size=1", "trainer.experiment_name=x", "trainer.max_steps=1", f"trainer.save_dir={folder}"]
    return load("sft", [*common, *overrides])


def checkpoint(folder: Path, step: int, began_with: dict[str, Any] | None = None) -> Path:
    """The files of a checkpoint that nobody loads."""
    made = folder / f"step_{step:06d}"
    for name in ("notes.json", "random.safetensors", "state/.metadata"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(json.dumps({"models": began_with or {}}))
    digests.write(made, digests.compute(made, ("notes.json", "random.safetensors", "state/.metadata")))
    return made


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def another_run(folder: Path) -> list[str]:
    return []


def no_checkpoint(folder: Path) -> list[str]:
    return ["trainer.load_ckpt_from=nowhere"]


def running(folder: Path) -> list[str]:
    RunLock(folder).acquire()
    return ["trainer.load_ckpt_from=latest"]


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "another run": (another_run, "already contains a run"),
    "no checkpoint": (no_checkpoint, "is not a checkpoint"),
    "a running one": (running, "is in use by the run of process"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_is_written_by_a_start_that_is_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "config.yaml").write_text("actor:\n  model_name: first\n")
    prepare, said = REFUSED[case]
    overrides = prepare(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=said), start(config(tmp_path, *overrides)):
        pass
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (("actor.model_name=other", *LORA), "actor.model_name=base, and here it is other"),
        (("actor.lora.rank=4", "actor.lora.alpha=16"), "actor.lora.alpha=8, and here it is 16"),
        ((*LORA, "actor.lora.target_modules=[q_proj]"), "actor.lora.target_modules="),
        (LORA, ""),
        (("actor.model_name=other",), ""),  # fails later, with the names of weights
    ],
)
def test_adapters_go_on_with_their_own_base_only(now: tuple[str, ...], said: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path, 3, models(asdict(config(tmp_path, *LORA))))
    (tmp_path / "config.yaml").write_text("old")
    resumed = config(tmp_path, *now, "trainer.load_ckpt_from=latest")
    if said:
        with pytest.raises(ConfigError, match=said), start(resumed):
            pass
    else:
        with start(resumed) as run:
            assert run.source == source
    assert (tmp_path / "config.yaml").read_text() == "old"


def test_a_link_to_the_base_is_the_base(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    checkpoint(tmp_path, 3, models(asdict(config(tmp_path, *LORA, f"actor.model_name={tmp_path}/model"))))
    resumed = config(tmp_path, *LORA, f"actor.model_name={tmp_path}/link", "trainer.load_ckpt_from=latest")
    with start(resumed):
        pass


def test_a_damaged_checkpoint_is_said_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, damaged = checkpoint(tmp_path, 3), checkpoint(tmp_path, 4)
    (damaged / "state" / ".metadata").write_text("")
    with start(config(tmp_path, "trainer.load_ckpt_from=latest")) as run:
        assert run.source == whole
    assert f"WARNING: {damaged} is damaged: state/.metadata is not as it was written" in capsys.readouterr().out


def test_processes_that_torchrun_starts_again_pass_over_a_damaged_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/somewhere/folder/attempt_1/0/error.json")
    (tmp_path / LAUNCHERS).write_text(json.dumps(launcher()))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    whole, damaged = checkpoint(tmp_path, 3), checkpoint(tmp_path, 4)
    (damaged / "notes.json").write_text("")
    with start(config(tmp_path)) as run:
        assert run.source == whole


def test_other_rows_than_those_of_the_checkpoint_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path, 3)
    notes = {"models": {}, "rows": {"data": "9 rows abc", "test data": "1 rows abc"}}
    (source / "notes.json").write_text(json.dumps(notes))
    digests.write(source, digests.compute(source, digests.read(source, ())))
    with start(config(tmp_path, "trainer.load_ckpt_from=latest")) as run:
        run.know_rows({"data": "9 rows abd", "test data": "1 rows abc", "more": "1 rows abc"})
        assert run.checkpoints.rows == {"data": "9 rows abd", "test data": "1 rows abc", "more": "1 rows abc"}
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert said == [f"WARNING: data has other rows than before: 9 rows abd, and {source} was made with 9 rows abc"]


def test_settings_that_changed_are_found(tmp_path: Path) -> None:
    file, before = tmp_path / "config.yaml", config(tmp_path, "trainer.seed=1", "actor.lr=1e-3")
    now = show(
        config(tmp_path, "trainer.seed=2", "actor.lr=1e-3", "data.path=y.jsonl", "trainer.load_ckpt_from=latest")
    )
    assert changed(file, now) == []  # there is none
    file.write_text(show(before))
    assert changed(file, now) == ["data.path=y.jsonl (before: x.jsonl)", "trainer.seed=2 (before: 1)"]
    assert changed(file, show(before)) == []
    file.write_text("a: [")
    assert changed(file, now) == []


def test_memory_that_ran_out_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as on_a_cpu:
        torch.empty(10**15)
    assert _is_out_of_memory(on_a_cpu.value)
    assert _is_out_of_memory(MemoryError())
    assert _is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert _is_out_of_memory(RuntimeError("can't start new thread"))
    assert not _is_out_of_memory(RuntimeError("shapes differ"))
