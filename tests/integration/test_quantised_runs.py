"""Programs that begin with a quantised checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from programs import World
from safetensors.torch import load_file
from tiny_quantised import quantise
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from RL2.tools.cli import app

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
LINE = "; its fp8 weights are read as value * scale, and an export is not quantised"


def test_a_run_dequantises_its_model_and_reference(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    wanted = quantise(model, FP8, "block")
    settings = [f"actor.model_name={model}", "actor.kl.coef=0.1", "actor.lr=0", "actor.weight_decay=0"]

    refused = world.run("ppo", *settings)
    assert refused.process.returncode != 0
    assert "is quantised (fp8), and its scales would be lost; set dequantize=true beside model_name" in refused.errors

    settings += ["actor.dequantize=true", "trainer.save_freq=1"]
    run = world.run("ppo", *settings, nproc=2).succeeded()
    assert run.output.count(LINE) == 2, "actor and reference"
    assert all(row["actor/kl"] == 0 for row in run.metrics if "actor/kl" in row)
    exported = load_file(run.weights)
    assert all(torch.equal(exported[name], x) for name, x in wanted.items()), "nothing was learnt"
    assert "quantization_config" not in json.loads((run.save_dir / "latest" / "config.json").read_text())

    checkpoint = sorted(run.save_dir.glob("step_*"))[-1]
    done = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.get_parameter(name), x) for name, x in wanted.items())
