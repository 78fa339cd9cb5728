"""The flat script of examples/ is the program: both end with the same weights."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from programs import World
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "rl_loop.py"


def test_the_flat_loop_ends_with_the_weights_of_the_program(world: World, tmp_path: Path) -> None:
    demo, out = tmp_path / "demo", tmp_path / "out"
    (demo / "data").mkdir(parents=True)
    shutil.copy(world.root / "rl.jsonl", demo / "data" / "train.jsonl")
    shutil.copytree(world.model, demo / "warm-up" / "latest")
    environment = world.reward("any(character.isdigit() for character in action)")
    options = ["--steps=3", "--prompts=4", f"--env={environment.partition('=')[2]}"]
    subprocess.run([sys.executable, SCRIPT, demo, out, *options], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    command = the_command().replace("runs/demo", str(demo))
    settings = [setting for setting in shlex.split(command) if "=" in setting and "save_dir" not in setting]
    others = ["train_data.prompts_per_rollout=4", "trainer.max_steps=3", environment]
    run = world.run("ppo", *settings, *others).succeeded()
    assert (out / "latest" / "model.safetensors").read_bytes() == run.weights.read_bytes()
    assert any(row["actor/grad_norm"] > 0 for row in run.metrics)
    before, after = load_file(world.weights), load_file(run.weights)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def the_command() -> str:
    """Return the command that the script claims to be."""
    described = ast.get_docstring(ast.parse(SCRIPT.read_text(encoding="utf-8")))
    assert described is not None
    return described[described.index("rl2 train ppo") : described.index("Left out")].replace("\\\n", " ")
