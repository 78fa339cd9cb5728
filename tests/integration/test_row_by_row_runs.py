"""Programs with models that run row by row and with mixtures of experts, on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from programs import World
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from RL2.tools.export import export


def make(world: World, model_type: str, folder: Path) -> Path:
    """Save a tiny model of this type with the tokenizer of the world's model."""
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    tiny_model(tiny_config(model_type, {"vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("program", "model_type", "nproc"), [("sft", "gpt2", 2), ("dpo", "qwen3_5_text", 1), ("rm", "qwen3_moe", 2)]
)
def test_a_run_trains_and_its_model_loads_in_transformers(
    program: str, model_type: str, nproc: int, world: World, tmp_path: Path
) -> None:
    group = "critic" if program == "rm" else "actor"
    model = make(world, model_type, tmp_path / "model")
    split = [f"{group}.ep_size=2"] if model_type == "qwen3_moe" else []
    run = world.run(program, f"{group}.model_name={model}", *split, nproc=nproc).succeeded()
    said = f"{model_type} runs row by row through its own forward (slower): it "
    assert (said in run.output) == (model_type != "qwen3_moe")
    assert len(run.metrics) == 3
    assert all(0 < row[f"{group}/grad_norm"] < float("inf") for row in run.metrics)
    auto = AutoModelForSequenceClassification if program == "rm" else AutoModelForCausalLM
    before, after = (auto.from_pretrained(path) for path in (model, run.save_dir / "latest"))
    moved = [not torch.equal(x, after.state_dict()[name]) for name, x in before.state_dict().items()]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize(
    ("program", "model_type", "more"),
    [("spo", "lfm2", []), ("ppo", "qwen3_moe", ["adv.estimator=gae", "critic.max_length_per_device=256"])],
)
def test_trainer_and_engine_have_the_same_numbers(
    program: str, model_type: str, more: list[str], world: World, tmp_path: Path
) -> None:
    model = make(world, model_type, tmp_path / "model")
    critic = [f"critic.model_name={model}"] if more else []
    run = world.run(program, f"actor.model_name={model}", *critic, *more).succeeded()
    gaps = [row["actor/logp_gap"] for row in run.metrics if "actor/logp_gap" in row]
    assert gaps
    assert max(gaps) < 1e-4


@pytest.mark.parametrize(("replay", "nproc"), [("engine", 2), ("old", 1)])
def test_experts_are_replayed(replay: str, nproc: int, world: World, tmp_path: Path) -> None:
    model = make(world, "glm4_moe", tmp_path / "model")
    settings = (
        f"actor.moe.replay={replay}",
        "actor.update_per_rollout=2",
        "actor.dtype=bfloat16",
        f"actor.ep_size={nproc}",
    )
    run = world.run("ppo", f"actor.model_name={model}", *settings, nproc=nproc).succeeded()
    changed = [row["actor/moe/routes_changed"] for row in run.metrics if "actor/moe/routes_changed" in row]
    assert len(changed) == 3
    assert all(0 <= share < 0.5 for share in changed)


def test_adapters_on_experts_are_sampled_with_and_exported(world: World, tmp_path: Path) -> None:
    model = make(world, "glm4_moe", tmp_path / "model")
    lora = ("actor.lora.rank=4", "actor.lora.target_modules=[all-linear,all-experts]", "actor.moe.replay=engine")
    run = world.run("spo", f"actor.model_name={model}", *lora, "actor.lr=1e-3", "trainer.save_freq=1").succeeded()
    assert max(row["actor/logp_gap"] for row in run.metrics if "actor/logp_gap" in row) < 1e-4
    checkpoint = max(run.save_dir.glob("step_*"))
    export(checkpoint, tmp_path / "merged", "", adapter=False)
    export(checkpoint, tmp_path / "adapter", "", adapter=True)
    base, latest, merged = (
        AutoModelForCausalLM.from_pretrained(x) for x in (model, run.save_dir / "latest", tmp_path / "merged")
    )
    ids = torch.arange(5, 25)[None]
    assert torch.equal(merged(ids).logits, latest(ids).logits)
    assert not torch.allclose(base(ids).logits, latest(ids).logits, atol=1e-4)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(adapted(ids).logits, latest(ids).logits, atol=1e-5, rtol=1e-4)
