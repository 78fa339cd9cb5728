"""A sweep: every run once, judged and compared; a failure loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import World
from typer.testing import CliRunner

from RL2.errors import ConfigError
from RL2.tools.cli import app
from RL2.tools.sweep import read

SWEEP = """
common:
{common}
methods:
  low: {{program: spo, settings: [actor.lr=1e-6]}}
  high:
    program: ppo
    settings: [actor.lr=1e-3, train_data.responses_per_prompt={responses}]
eval: [data={root}/rl.jsonl, env={env}, samples=2, max_new_tokens=12]
"""


def write(world: World, file: Path, responses: str = "4") -> Path:
    settings = [
        override for override in world.rl if not override.startswith(("trainer.exp", "actor.lr", "trainer.max"))
    ]
    common = "\n".join(f"- {override}" for override in [*settings, "trainer.max_steps=2"])
    env = next(override for override in world.rl if "env_path" in override).partition("=")[2]
    file.write_text(SWEEP.format(common=common, root=world.root, env=env, responses=responses))
    return file


def test_a_sweep_runs_judges_and_compares_and_goes_on_where_it_was(
    world: World, warm_jobs: None, tmp_path: Path
) -> None:
    file, out = write(world, tmp_path / "sweep.yaml"), tmp_path / "out"
    arguments = ["sweep", str(file), "--seeds", "2", "--out", str(out)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    for name in ("low-0", "high-0", "low-1", "high-1"):
        assert len((out / name / "metrics.jsonl").read_text().splitlines()) == 2
    assert f"comparison: {out / 'comparison.md'}" in first.output
    assert "; 3 to go, about " in first.output
    comparison = (out / "comparison.md").read_text()
    assert "high: greedy score" in comparison
    assert "high: sampled score" in comparison
    assert "over 2 and 2 runs" in comparison
    judged = json.loads((out / "comparison.json").read_text())
    assert [(one["method"], one["seed"]) for one in judged] == [("low", 0), ("high", 0), ("low", 1), ("high", 1)]

    (out / "high-1" / "done.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/latest/model.safetensors")}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    changed = {path.parts[-3] for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"high-1"}
    assert again.output.count("done before") == 3
    assert (out / "comparison.md").read_text() == comparison

    (out / "low-0" / "done.json").unlink()
    listed = CliRunner().invoke(app, [*arguments, "--slurm", "launch.sh"])
    (line,) = listed.output.splitlines()
    assert line.startswith("sbatch launch.sh spo ")
    assert f"trainer.save_dir={out}/low-0" in line


def test_mistakes_are_named_before_anything_runs(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sweep.yaml, high: train_data.responses_per_prompt=0; must be"):
        read(write(world, tmp_path / "sweep.yaml", responses="0"), 2, tmp_path / "out")
    (tmp_path / "none.yaml").write_text("methods: [spo]")
    with pytest.raises(ConfigError, match=r"none.yaml is not a sweep"):
        read(tmp_path / "none.yaml", 1, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"nowhere.yaml"):
        read(tmp_path / "nowhere.yaml", 1, tmp_path / "out")
    text = (tmp_path / "sweep.yaml").read_text().replace("responses_per_prompt=0", "responses_per_prompt=4")
    (tmp_path / "eval.yaml").write_text(text.replace("samples=2", "sample=2"))
    with pytest.raises(ConfigError, match=r"eval.yaml, eval: 'sample' is not a setting"):
        read(tmp_path / "eval.yaml", 1, tmp_path / "out")
    (tmp_path / "program.yaml").write_text(text.replace("program: ppo", "program: grpo"))
    with pytest.raises(ConfigError, match=r"program.yaml, high: program: grpo; choose one of"):
        read(tmp_path / "program.yaml", 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()
