"""Programs with multimodal checkpoints: trained, resumed, exported and evaluated by their text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import World, without_times
from safetensors.torch import load_file
from tiny_multimodal import multimodal_config, multimodal_model
from transformers import AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner

from RL2.tools.cli import app

ENVIRONMENT = """
async def step(state, action, extra_info):
    return dict(next_state=None, reward=1.0, score=1.0, done=True)
"""


def make(world: World, model_type: str, folder: Path) -> Path:
    """Save a tiny multimodal model with the tokenizer of the world's model."""
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    config = multimodal_config(model_type, {"vocab_size": max(320, len(tokenizer))})
    multimodal_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_resumes_and_its_checkpoint_is_exported_whole(world: World, tmp_path: Path) -> None:
    model = make(world, "gemma3", tmp_path / "model")
    settings = [f"actor.model_name={model}", "trainer.save_freq=1"]
    run = world.run("sft", *settings, nproc=2).succeeded()
    assert "; gemma3: trains the text model; the vision part is exported unchanged" in run.output
    assert len(run.metrics) == 3
    again = world.run("sft", *settings, f"trainer.load_ckpt_from={run.save_dir}/step_000002").succeeded()
    assert without_times(again.metrics)[-1]["actor/loss"] == pytest.approx(run.metrics[-1]["actor/loss"], rel=1e-4)

    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", f"{run.save_dir}/step_000003", str(out)])
    assert done.exit_code == 0, done.output
    before, ours = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    latest = load_file(run.save_dir / "latest" / "model.safetensors")
    assert all(torch.equal(x, ours[name]) for name, x in latest.items())
    moved = {name for name, x in before.items() if not torch.equal(x, ours[name])}
    assert {name.partition(".")[0] for name in moved} == {"language_model"}
    _, loading = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading

    script = tmp_path / "graded.py"
    script.write_text(ENVIRONMENT)
    asked = (
        f"model={out} data={world.root}/rl.jsonl env={script} out={tmp_path}/evals samples=1 max_new_tokens=4 limit=2"
    )
    done = CliRunner().invoke(app, ["eval", *asked.split()])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("model_type", "gae"), [("qwen3_5", False), ("mistral3", True)])
def test_trainer_and_engine_of_a_multimodal_model_agree(
    model_type: str, gae: bool, world: World, tmp_path: Path
) -> None:
    model = make(world, model_type, tmp_path / "model")
    more = ["adv.estimator=gae", "critic.max_length_per_device=256", f"critic.model_name={model}"] if gae else []
    run = world.run("ppo" if gae else "spo", f"actor.model_name={model}", *more).succeeded()
    gaps = [row["actor/logp_gap"] for row in run.metrics if "actor/logp_gap" in row]
    assert gaps
    assert max(gaps) < 1e-4
