"""A model that is not known to be exact ends every program in one line, and the dry run in the same one."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import World
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, tiny_config, tiny_model
from transformers import AutoTokenizer

from RL2.trainer.launch import main

Make = Callable[[Path], None]


def tiny(model_type: str, **settings: object) -> Make:
    def make(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        shutil.rmtree(folder)
        tiny_model(tiny_config(model_type, {**settings, "vocab_size": len(tokenizer)})).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make


def more_tensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), "vision.weight": torch.ones(2)}, file, metadata={"format": "pt"})


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


REFUSED: dict[str, tuple[Make, str]] = {
    "sees later tokens": (tiny("bert"), "bert has attention that is not causal (is_decoder=false)"),
    "dropout": (tiny("biogpt"), "biogpt draws random numbers in its layers (dropout), which cannot be switched off"),
    "quantised": (quantised, "qwen3 is quantised (fp8), and its scales would be lost"),
    "more tensors": (more_tensors, " has 1 tensors that "),
}


def last_line(program: str, settings: list[str]) -> str:
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["", *settings])
        with pytest.raises(SystemExit) as ended:
            main(program)
    assert isinstance(ended.value.code, str), "a text is printed, and the exit code is 1"
    return ended.value.code


@pytest.mark.parametrize("program", ["sft", "rm", "dpo", "spo"])
@pytest.mark.parametrize("name", REFUSED)
def test_run_and_dry_run_refuse_in_the_same_line(name: str, program: str, world: World, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    shutil.copytree(world.model, tmp_path / "model")
    make(tmp_path / "model")
    group = "critic" if program == "rm" else "actor"
    settings = [*world.settings(program), f"{group}.model_name={tmp_path}/model", f"trainer.save_dir={tmp_path}/run"]
    lines = [last_line(program, [*settings, f"trainer.dry_run={dry}"]) for dry in ("true", "false")]
    assert lines[0] == lines[1]
    assert said in lines[0]
    assert lines[0].startswith(f"{program}: {group}.model_name={tmp_path}/model")
    assert "\n" not in lines[0]


def test_run_and_dry_run_say_that_a_model_runs_row_by_row(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world.model, tmp_path / "model")
    tiny("lfm2")(tmp_path / "model")
    settings = [*world.settings("sft"), f"actor.model_name={tmp_path}/model", f"trainer.save_dir={tmp_path}/run"]
    for dry in ("true", "false"):
        monkeypatch.setattr(sys, "argv", ["", *settings, f"trainer.dry_run={dry}"])
        main("sft")
        said = re.sub(r"[│\s]+", " ", capsys.readouterr().out)  # without the borders and line breaks of a table
        assert "lfm2 runs row by row through its own forward (slower): it mixes tokens outside attention (con" in said
    assert list((tmp_path / "run").rglob("model.safetensors"))


@pytest.mark.parametrize("program", ["sft", "dpo"])
def test_a_row_beyond_the_limit_of_rotary_frequencies_is_refused(program: str, world: World, tmp_path: Path) -> None:
    shutil.copytree(world.model, tmp_path / "model")
    settings = dict(VARIANTS["phi3, longrope"][1])
    rope = {**settings["rope_parameters"], "original_max_position_embeddings": 4}
    tiny("phi3", rope_parameters=rope, original_max_position_embeddings=4)(tmp_path / "model")
    overrides = [*world.settings(program), f"actor.model_name={tmp_path}/model", f"trainer.save_dir={tmp_path}/run"]
    lines = [last_line(program, [*overrides, f"trainer.dry_run={dry}"]) for dry in ("true", "false")]
    assert lines[0] == lines[1]
    assert "tokens, and beyond 4 actor.model_name=" in lines[0]
    assert lines[0].endswith("which is not supported; lower data.max_length=128 to 4")


BESIDE = {
    "reference of dpo": ("dpo", "ref_actor", []),
    "reference of ppo": ("ppo", "ref_actor", ["actor.kl.coef=0.1"]),
    "critic of ppo": ("ppo", "critic", ["adv.estimator=gae", "critic.max_length_per_device=256"]),
}


@pytest.mark.parametrize("fault", ["quantised", "no folder", "too few tokens"])
@pytest.mark.parametrize("beside", BESIDE)
def test_models_beside_the_trained_one_are_refused_as_it_is(
    beside: str, fault: str, world: World, tmp_path: Path
) -> None:
    program, group, more = BESIDE[beside]
    if fault != "no folder":
        shutil.copytree(world.model, tmp_path / "model")
    if fault == "quantised":
        quantised(tmp_path / "model")
    elif fault == "too few tokens":
        tiny_model(tiny_config("qwen3", {"vocab_size": 20})).save_pretrained(tmp_path / "model")
    overrides = [*world.settings(program), *more, f"{group}.model_name={tmp_path}/model"]
    overrides += [f"trainer.save_dir={tmp_path}/run"]
    lines = [last_line(program, [*overrides, f"trainer.dry_run={dry}"]) for dry in ("true", "false")]
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"{program}: {group}.model_name={tmp_path}/model")
