"""The commands around training: what they print, hand on and end with."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from programs import World
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner, Result

from RL2.tools import doctor
from RL2.tools.cli import app

RL2 = [str(Path(sys.executable).with_name("rl2"))]


def test_train_is_the_program_and_says_how_it_is_called(world: World) -> None:
    settings = [*world.settings("sft"), f"trainer.save_dir={world.root}/by_cli", "trainer.max_steps=1"]
    done = subprocess.run([*RL2, "train", "sft", *settings], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{sys.executable} -m RL2.trainer.sft data.path=")
    assert "step 0/1" in done.stdout
    assert (world.root / "by_cli" / "latest" / "model.safetensors").exists()


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_errors_and_exit_codes_are_the_programs(nproc: str) -> None:
    done = subprocess.run(
        [*RL2, "train", "spo", "--nproc", nproc, "--dry-run"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "6 keys are not set; pass train_data.prompts_per_rollout=... actor.model_name=... " in done.stderr
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 " if nproc == "2" else ""
    assert done.stdout.startswith(f"{sys.executable} {launcher}-m RL2.trainer.spo trainer.dry_run=true\n")


def test_a_program_that_is_not_there() -> None:
    result = CliRunner().invoke(app, ["train", "grpo"])
    assert (result.exit_code, str(result.exception)) == (
        1,
        "rl2 train: grpo: choose one of sft, rm, dpo, ppo, spo, spo_0p5, path, distill",
    )


def test_export_is_the_model_of_a_checkpoint(world: World) -> None:
    run = world.root / "exported"
    settings = [*world.settings("sft"), f"trainer.save_dir={run}", "trainer.max_steps=2", "trainer.save_freq=1"]
    done = subprocess.run([*RL2, "train", "sft", *settings], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

    def export(step: int, *more: str) -> Result:
        return CliRunner().invoke(app, ["export", f"{run}/step_{step:06d}", f"{run}/of_{step}", *more])

    for step in (1, 2):
        assert export(step).exit_code == 0
    first, last, latest = (load_file(run / name / "model.safetensors") for name in ("of_1", "of_2", "latest"))
    assert last.keys() == latest.keys() and all(last[name].equal(latest[name]) for name in latest)
    assert not all(first[name].equal(latest[name]) for name in latest)
    assert AutoModelForCausalLM.from_pretrained(run / "of_1").num_parameters() > 0

    assert str(export(2).exception) == f"rl2 export: {run}/of_2 exists; choose a new folder"
    assert str(export(3).exception).startswith(f"rl2 export: {run}/step_000003 is not a checkpoint")
    shutil.rmtree(run / "of_2")
    config = json.loads((world.model / "config.json").read_text())
    other = shutil.copytree(world.model, run / "smaller")
    layers = config["num_hidden_layers"] - 1
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    (other / "config.json").write_text(json.dumps(config))
    weights = load_file(other / "model.safetensors")
    fewer = {name: x for name, x in weights.items() if f".layers.{layers}." not in name}
    save_file(fewer, other / "model.safetensors", metadata={"format": "pt"})
    failed = str(export(2, "--model", str(other)).exception)
    assert f"does not fit the model: only the checkpoint has lm.model.layers.{layers}." in failed
    assert not (run / "of_2").exists()
    began_with = f"began with {world.model}"
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(world.model), str(other)))
    assert f"{run}/step_000002 {began_with}, {run}/config.yaml has {other}" in str(export(2).exception)
    (run / "config.yaml").unlink()
    assert export(2).exit_code == 0


def trained(world: World, program: str, *overrides: str) -> Path:
    """The last checkpoint of a short run, beside which its own export lies."""
    run = world.run(program, *overrides, "trainer.max_steps=2", "trainer.save_freq=1").succeeded()
    return run.save_dir / "step_000002"


def exported(checkpoint: Path, out: Path, *options: str) -> Path:
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(out), *options])
    assert result.exit_code == 0, result.exception
    return out


IDS = torch.arange(5, 25)[None]


def test_export_merges_adapters_or_leaves_them_alone(world: World, tmp_path: Path) -> None:
    checkpoint = trained(world, "sft", "actor.lora.rank=4")
    merged = AutoModelForCausalLM.from_pretrained(exported(checkpoint, tmp_path / "merged"))
    latest = AutoModelForCausalLM.from_pretrained(checkpoint.parent / "latest")
    base = AutoModelForCausalLM.from_pretrained(world.model)
    assert not torch.allclose(base(IDS).logits, latest(IDS).logits, atol=1e-4), "it has learnt something"
    assert torch.equal(merged(IDS).logits, latest(IDS).logits)
    adapted = PeftModel.from_pretrained(base, exported(checkpoint, tmp_path / "adapter", "--adapter"))
    torch.testing.assert_close(adapted(IDS).logits, latest(IDS).logits, atol=1e-5, rtol=1e-4)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def test_export_of_a_reward_model(world: World, tmp_path: Path) -> None:
    checkpoint = trained(world, "rm")
    model, latest = (
        AutoModelForSequenceClassification.from_pretrained(folder)
        for folder in (exported(checkpoint, tmp_path / "rm"), checkpoint.parent / "latest")
    )
    assert model(IDS).logits.shape == (1, 1)
    assert torch.equal(model(IDS).logits, latest(IDS).logits)
    assert model.config.pad_token_id == latest.config.pad_token_id

    result = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "adapter"), "--adapter"])
    assert "has no adapters: its run trained all weights" in str(result.exception)


def test_export_on_a_full_disk_leaves_nothing(world: World, tmp_path: Path) -> None:
    checkpoint = trained(world, "sft")

    def no_large_file() -> None:  # what is written beyond fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [*RL2, "export", str(checkpoint), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=no_large_file,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"rl2 export: {tmp_path}/out could not be written: ")
    assert last.endswith("; it was removed")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said_in_a_line(world: World, tmp_path: Path) -> None:
    run = trained(world, "sft").parent
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["view", str(run), "--out", f"{tmp_path}/file/view.html"])
    assert result.exit_code == 1
    assert str(result.exception) == f"rl2 view: [Errno 17] File exists: '{tmp_path}/file'"


@pytest.mark.parametrize(
    ("missing", "command"),
    [("plotly", ["demo"]), ("hydra", ["train", "spo"]), ("transformers", ["reproduce", "thesis"])],
)
def test_a_package_that_is_not_installed(missing: str, command: list[str]) -> None:
    without = f"import sys; sys.modules[{missing!r}] = None; from RL2.tools.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", without, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"rl2 {command[0]}: ")
    assert missing in last and last.endswith("; `rl2 doctor` lists what to install")
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
    assert found["torch"].found.endswith("but >=99 is needed")
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
    assert str(result.exception) == "rl2 doctor: missing or unsuitable: torch, nothing-of-this-name"


def test_every_extra_is_explained() -> None:
    assert set(doctor.EXTRAS) == set(doctor.extras()) - {"dev"}
