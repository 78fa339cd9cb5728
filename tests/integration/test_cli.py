"""The commands around training: what they print, hand on and end with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import World
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from RL2 import doctor
from RL2.cli import app

RL2 = [str(Path(sys.executable).with_name("rl2"))]


def test_train_is_the_program_and_says_how_it_is_called(world: World) -> None:
    settings = [*world.settings("sft"), f"trainer.save_dir={world.root}/by_cli", "trainer.max_steps=1"]
    done = subprocess.run([*RL2, "train", "sft", *settings], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{sys.executable} -m RL2.trainer.sft data.path=")
    assert "step 0/1" in done.stdout
    assert (world.root / "by_cli" / "latest" / "model.safetensors").exists()


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_errors_and_exit_codes_are_the_programs(nproc: str) -> None:
    done = subprocess.run(
        [*RL2, "train", "spo", "--nproc", nproc, "--dry-run"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "train_data.prompts_per_rollout is not set" in done.stderr
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 " if nproc == "2" else ""
    assert done.stdout.startswith(f"{sys.executable} {launcher}-m RL2.trainer.spo trainer.dry_run=true\n")


def test_a_program_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["train", "grpo"])
    assert (result.exit_code, str(result.exception)) == (
        1,
        "rl2 train: grpo: choose one of sft, rm, dpo, ppo, spo, spo_0p5",
    )


def test_export_is_the_model_of_a_checkpoint(world: World) -> None:
    run = world.root / "exported"
    settings = [*world.settings("sft"), f"trainer.save_dir={run}", "trainer.max_steps=2", "trainer.save_freq=1"]
    done = subprocess.run([*RL2, "train", "sft", *settings], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    def export(step: int, *more: str) -> Result:
        return CliRunner().invoke(app, ["export", f"{run}/step_{step:06d}", f"{run}/of_{step}", *more])

    for step in (1, 2):
        assert export(step).exit_code == 0
    first, last, latest = (load_file(run / name / "model.safetensors") for name in ("of_1", "of_2", "latest"))
    assert last.keys() == latest.keys() and all(last[name].equal(latest[name]) for name in latest)
    assert not all(first[name].equal(latest[name]) for name in latest)
    assert AutoModelForCausalLM.from_pretrained(run / "of_1").num_parameters() > 0

    assert str(export(2).exception) == f"rl2 export: {run}/of_2 exists; name a folder that does not"
    assert str(export(3).exception).startswith(f"rl2 export: {run}/step_000003 is not a checkpoint")
    shutil.rmtree(run / "of_2")
    config = json.loads((world.model / "config.json").read_text())
    other = shutil.copytree(world.model, run / "smaller")
    layers = config["num_hidden_layers"] - 1
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    (other / "config.json").write_text(json.dumps(config))
    failed = str(export(2, "--model", str(other)).exception)
    assert f"is of another kind of model: only the checkpoint has lm.model.layers.{layers}." in failed
    assert not (run / "of_2").exists()
    (run / "config.yaml").unlink()
    assert (
        str(export(2).exception)
        == f"rl2 export: {run}/config.yaml is not there; pass --model with what the run began with"
    )


@pytest.mark.parametrize(
    ("missing", "command"),
    [("plotly", ["demo"]), ("hydra", ["train", "spo"]), ("transformers", ["reproduce", "thesis"])],
)
def test_a_package_that_is_not_installed(missing: str, command: list[str]) -> None:
    without = f"import sys; sys.modules[{missing!r}] = None; from RL2.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", without, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"rl2 {command[0]}: ")
    assert missing in last and last.endswith("; `rl2 doctor` says what to install")
    assert "Traceback" not in done.stderr


def test_doctor_finds_nothing_missing_here() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "free memory" in result.output


def test_doctor_says_what_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=99", "nothing-of-this-name>=1", 'also-not-there>=2; extra == "wandb"', 'rich>=1; extra == "lora"']
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    found = {finding.what: finding for finding in doctor.examine()}
    assert found["torch"].mark == "missing"
    assert found["torch"].found.endswith("and >=99 is needed")
    assert found["nothing-of-this-name"] == (
        "nothing-of-this-name",
        "missing",
        "not installed",
        "pip install 'nothing-of-this-name>=1'",
    )
    assert found["[wandb]"].mark == "optional"
    assert found["[wandb]"].remedy == "pip install 'rl2-spo[wandb]'"
    assert found["[lora]"].mark == "ok"
    result = CliRunner().invoke(app, ["doctor"])
    assert str(result.exception) == "rl2 doctor: not as needed: torch, nothing-of-this-name"


def test_every_extra_is_explained() -> None:
    assert set(doctor.EXTRAS) == set(doctor.extras()) - {"dev"}
