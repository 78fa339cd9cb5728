"""Every example is a command that works as it stands, checked with a dry run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from RL2.trainer.launch import main

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.sh"))
DRY = ("trainer.dry_run=true", "trainer.experiment_name=renamed")

LEFT = "\N{BOX DRAWINGS LIGHT VERTICAL}"
SAYS = {
    "sft": ("data", "rows through", "test data"),
    "rm": ("data", "rows through", "test data"),
    "dpo": ("data", "rows through", "test data", "reference"),
    "ppo": ("train data", "test data", "environment", "engine", "objective"),
}
"""Program -> the lines of a dry run; `ppo` stands for all of reinforcement learning."""


def run(example: Path, bin_folder: Path) -> subprocess.CompletedProcess[str]:
    """The script with the commands of `bin_folder` first, started from a folder that is not the repository."""
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "NPROC": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(example), *DRY]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=600)


def check(program: str, output: str) -> None:
    assert "experiment_name: renamed\n" in output
    assert "save_dir: ckpts/renamed\n" in output
    says = {line.split(LEFT)[1].strip() for line in output.splitlines() if line.startswith(LEFT)}
    assert says >= {"program", "model", "a step", "writes to", *SAYS.get(program, SAYS["ppo"])}
    assert output.splitlines()[-1].startswith("dry run: all checks passed")


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A folder with a `torchrun` that only tells its arguments, a line each."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    torchrun.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_resolves(
    example: Path, recorder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(example, recorder)
    assert done.returncode == 0, done.stderr
    processes, module_flag, module, *overrides = done.stdout.splitlines()
    assert (processes, module_flag) == ("--nproc_per_node=1", "-m")
    assert overrides[-len(DRY) :] == list(DRY)  # what is given to the script goes last, and so wins
    program = module.removeprefix("RL2.trainer.")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *overrides])
    main(program)
    check(program, capsys.readouterr().out)


@pytest.mark.slow
def test_examples_run_under_torchrun() -> None:
    """The whole way for one of each kind; the others differ in their overrides only."""
    chosen = {"sft": ROOT / "examples" / "gsm8k_sft.sh", "ppo": ROOT / "examples" / "gsm8k_reinforce.sh"}
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda example: run(example, Path(sys.executable).parent), chosen.values())
        for program, done in zip(chosen, results, strict=True):
            assert done.returncode == 0, done.stderr
            check(program, done.stdout)
    assert not (ROOT / "ckpts" / "renamed").exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_written_with_care(example: Path) -> None:
    text = example.read_text()
    assert os.access(example, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert re.search(r"^# .*hardware", text, re.IGNORECASE | re.MULTILINE), "say what it was written for"
    # without the space a value takes in the next line
    assert not re.search(r"\S\\$", text, re.MULTILINE)
    assert text.endswith('"$@"\n')
    assert "/home/" not in text


def shims(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which these commands are played by shell scripts."""
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def check_launch(arguments: list[str], endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun was given meets at `endpoint`, restarts, and runs a program that resolves."""
    settings = arguments[: arguments.index("-m")]
    assert {"--nnodes=2", "--nproc_per_node=8", "--max-restarts=3", "--rdzv-backend=c10d"} <= set(settings)
    assert f"--rdzv-endpoint={endpoint}" in settings
    module, *overrides = arguments[len(settings) + 1 :]
    assert "trainer.load_ckpt_from=latest" in overrides
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *overrides, *DRY])
    main(module.removeprefix("RL2.trainer."))


def test_the_slurm_script_runs_torchrun_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = shims(
        tmp_path,
        scontrol='printf "%s\\n" node7 node8',
        srun="shift; shift; printf '%s\\n' \"$@\"",
    ) | {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "5",
    }
    sft = ["sft", "data.path=train@openai/gsm8k:main", "data.env_path=envs/gsm8k.py", "data.max_length=1024"]
    sft += ["data.batch_size=64", "actor.model_name=Qwen/Qwen3-0.6B", "actor.max_length_per_device=16384"]
    script = ["bash", str(ROOT / "examples" / "launch" / "slurm.sh")]
    done = subprocess.run([*script, *sft], env=environment, capture_output=True, text=True, timeout=600, check=True)
    check_launch(done.stdout.splitlines(), "node7:29500", monkeypatch)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_sky_file_runs_torchrun_on_every_node(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = yaml.safe_load((ROOT / "examples" / "launch" / "sky.yaml").read_text())
    assert task["num_nodes"] == 2
    environment = shims(tmp_path, torchrun="printf '%s\\n' \"$@\"") | {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_RANK": str(rank),
    }
    done = subprocess.run(
        ["bash", "-eu", "-c", task["run"]], env=environment, capture_output=True, text=True, timeout=600, check=True
    )
    arguments = done.stdout.splitlines()
    assert f"--rdzv-conf=is_host={1 - rank}" in arguments
    check_launch(arguments, "10.0.0.1:29500", monkeypatch)
