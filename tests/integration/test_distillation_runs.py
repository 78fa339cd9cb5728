"""Runs with a teacher: without rewards, on rows of data, on two processes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from programs import World
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of another hidden size, with a padded vocabulary and the tokenizer of the world's model."""
    folder = tmp_path_factory.mktemp("teacher")
    config = Qwen3Config.from_pretrained(world.model)
    config.hidden_size, config.vocab_size, config.initializer_range = 48, config.vocab_size + 3, 0.3
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.model).save_pretrained(folder)
    return folder


def test_distillation_needs_no_rewards_and_is_the_same_on_two_processes(world: World, teacher: Path) -> None:
    settings = (f"teacher.model_name={teacher}", "rollout.env_path=null", "actor.lr=1e-2", "trainer.max_steps=4")
    both = ("actor.objective=opd+gkd", "actor.objective_args.beta=0.3")
    alone, two = (world.start("distill", *settings, *both, nproc=nproc) for nproc in (1, 2))
    names = ("actor/loss_opd", "actor/loss_gkd")
    losses = [[row[name] for name in names] for row in alone.wait().succeeded().metrics if "actor/loss" in row]
    assert len(losses) == 4
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    assert all(row["train/reward"] == 0 for row in alone.metrics if "train/reward" in row)
    assert f"teacher: {teacher}: Qwen3ForCausalLM" in alone.output
    of_two = [[row[name] for name in names] for row in two.wait().succeeded().metrics if "actor/loss" in row]
    for mine, theirs in zip(losses, of_two, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-4)


def test_distillation_on_rows(world: World, teacher: Path) -> None:
    settings = (f"teacher.model_name={teacher}", "actor.objective=forward_kl", "actor.lr=1e-2", "trainer.max_steps=6")
    run = world.run("sft", *settings, "trainer.n_epochs=2").succeeded()
    losses = [row["actor/loss"] for row in run.metrics if "actor/loss" in row]
    assert losses[-1] < losses[0]


def test_another_tokenizer_is_refused_by_content(world: World, teacher: Path, tmp_path: Path) -> None:
    for file in teacher.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]  # type: ignore[arg-type]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(tokenizer))
    run = world.run("distill", f"teacher.model_name={tmp_path}", "rollout.env_path=null")
    assert run.process.returncode == 1
    expected = f"teacher.model_name={tmp_path} has another tokenizer than actor.model_name={world.model}: token "
    assert expected in run.errors


def test_the_dry_run_counts_the_teacher(world: World, teacher: Path) -> None:
    run = world.run("distill", f"teacher.model_name={teacher}", "rollout.env_path=null", "--dry-run").succeeded()
    assert "Qwen3ForCausalLM" in run.output
    memory = next(line for line in run.output.splitlines() if "activations" in line)
    assert "teacher" in run.output[run.output.index(memory[:20]) :]
