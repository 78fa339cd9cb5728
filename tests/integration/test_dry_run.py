"""A dry run looks at everything, loads no model, says what it found, and leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import NUM_ROWS, World
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from RL2.trainer.launch import main

DryRun = Callable[..., str]


@pytest.fixture
def dry_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> DryRun:
    """Runs a program dry, and gives what it printed, in one line."""
    monkeypatch.setattr("torch.distributed.checkpoint.load", None)  # whoever loads weights fails
    monkeypatch.setenv("COLUMNS", "200")

    def run(program: str, *overrides: str, how: str = "trainer.dry_run=true") -> str:
        settings = [*world.settings(program), f"trainer.save_dir={tmp_path}/run", how, *overrides]
        monkeypatch.setattr(sys, "argv", ["", *settings])
        main(program)
        assert not (tmp_path / "run").exists()
        return " ".join(capsys.readouterr().out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())

    return run


@pytest.mark.parametrize("program", ["sft", "rm", "dpo", "spo"])
def test_all_is_looked_at(program: str, dry_run: DryRun) -> None:
    said = dry_run(program, "trainer.save_freq=2")
    rows = {"sft": f"{NUM_ROWS} examples, 0 left out", "spo": f"{NUM_ROWS} rows; prompts of"}
    for words in (
        rows.get(program, f"{NUM_ROWS} pairs, 0 left out"),
        "Qwen3ForSequenceClassification" if program == "rm" else "Qwen3ForCausalLM",
        "steps 3",
        "checkpoints every 2 steps",
        "a process at the peak of an update",
        "sampling ends with <|im_end|>",
        "[[response]]" if program == "spo" else "<|im_end|>]]",
    ):
        assert words in said
    assert said.endswith("dry run: all checks passed")


def test_what_would_fail_on_this_machine_is_warned_of(dry_run: DryRun, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    said = dry_run(
        "spo",
        *("rollout.engine=vllm", "rollout.vllm.python=/nowhere/python", "trainer.use_wandb=true"),
        *("trainer.save_freq=1", "trainer.max_steps=1000000000", "trainer.keep=0"),
    )
    assert "WARNING rollout.vllm.python=/nowhere/python: there is no such interpreter" in said
    assert "WARNING trainer.use_wandb needs a package that is not installed" in said
    assert "WARNING checkpoints and model take up to " in said
    assert "samples and tokens (trainer.records_mib) take up to 4.0 GiB, and there are" in said
    assert "3 WARNING(s), see above: the run would fail on this machine dry run: all checks passed" in said


def test_the_environment_is_tried(dry_run: DryRun) -> None:
    assert "tried with the first row and the response '42': reward 1" in dry_run("spo", how="--dry-run")


def test_a_weight_without_a_part_is_named(dry_run: DryRun, tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': None, 'reward': {'correct': True, 'format': 2}, 'score': 1, 'done': True,\n"
        "            'extra_info': extra_info}\n"
    )
    weights = "reward.weights.format=0.5", "reward.weights.corect=2"
    said = dry_run("spo", f"rollout.env_path={tmp_path}/parts.py", *weights)
    assert "reward 2, of correct 1, format 2 CAUTION: reward.weights.corect weighs no part of this reward" in said
    assert "weighs no part of this reward; it is a number" in dry_run("spo", *weights)


def test_every_test_set_is_looked_at(dry_run: DryRun, world: World, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "async def step(state, action, extra_info):\n"
        "    return {'next_state': None, 'reward': 0.25, 'score': 1, 'done': True, 'extra_info': extra_info}\n"
    )
    rows = tmp_path / "few.jsonl"
    rows.write_text('{"prompt": "1?"}\n' * 3)
    sets = (
        *("trainer.test_freq=1", f"test_data.path={world.root}/rl.jsonl"),
        *(f"test_data.sets.few.path={rows}", f"test_data.sets.few.env_path={tmp_path}/other.py"),
    )
    said = dry_run("spo", *sets)
    assert f"test data {world.root}/rl.jsonl: jsonl file" in said
    assert f"test data few {rows}: jsonl file" in said
    assert "3 rows; prompts of" in said
    assert f"test_data.sets.few.env_path: {tmp_path}/other.py tried with the first row" in said
    assert "reward 0.25" in said
    for key, value in (("path", "missing.jsonl"), ("env_path", "missing.py")):
        with pytest.raises(SystemExit, match=f"test_data.sets.few.{key}={value}: there is no such file"):
            dry_run("spo", *sets, f"test_data.sets.few.{key}={value}")
    (tmp_path / "other.py").write_text("async def step(state, action, extra_info):\n    return 1\n")
    with pytest.raises(SystemExit, match=r"test_data\.sets\.few\.env_path=.*step returned an int; expected a dict"):
        dry_run("spo", *sets)


def test_an_answer_in_the_prompt_is_named(dry_run: DryRun, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "7+7=", "extra_info": {"answer": "14"}}
    rows.write_text("\n".join(map(json.dumps, [row, row | {"prompt": "7+7= #### 14"}, row, row])))
    said = dry_run("spo", f"train_data.path={rows}")
    assert "CAUTION: 1 prompts give the right answer, first in row 2: '#### 14'" in said


def test_tokens_are_bounded(dry_run: DryRun) -> None:
    said = dry_run("spo", "rollout.max_turns=2", "trainer.max_steps=null", "trainer.n_epochs=2")
    assert f"steps {2 * NUM_ROWS // 4}, which sample at most 4.61 thousand tokens (384 each)" in said


def test_without_rows_an_epoch_is_a_step(dry_run: DryRun, tmp_path: Path) -> None:
    script = tmp_path / "env.py"
    script.write_text(MADE_UP)
    epochs = ("train_data.path=null", "trainer.max_steps=null", "trainer.n_epochs=7")
    said = dry_run("spo", f"rollout.env_path={script}", *epochs)
    assert "steps 7, which sample at most" in said
    assert said.endswith("dry run: all checks passed")


def test_what_is_on_the_hub_is_named(dry_run: DryRun) -> None:
    said = dry_run("spo", "actor.model_name=nobody/nothing", "rollout.model_name=nobody/nothing")
    assert "model nobody/nothing, on the hub: not checked" in said
    assert f"{NUM_ROWS} rows, in the right format" in said
    assert said.endswith("dry run: all checks passed; not checked: model, step of the environment")
    said = dry_run("dpo", "data.path=nobody/pairs")
    assert "nobody/pairs: hub data set nobody/pairs, split train" in said
    assert said.endswith("not checked: rows")


def test_adapters_take_less_memory(dry_run: DryRun) -> None:
    whole, adapters = (
        float(dry_run("sft", f"actor.lora.rank={rank}").partition("optimizer ")[2].split()[0]) for rank in (0, 8)
    )
    assert 0 < adapters < whole / 4


ROLES = """
ROLES = ("first", "second", "third", "fourth")

async def play(ask, task):
    return {"rewards": {role: len(await ask(role, "Your move?")) for role in ROLES}}
"""


def test_opponents_take_memory_once_for_each_model(dry_run: DryRun, world: World, tmp_path: Path) -> None:
    opponents = {"second": "start", "third": str(world.model), "fourth": str(world.model)}
    (tmp_path / "roles.py").write_text(ROLES)
    settings = ("train_data.path=null", f"rollout.env_path={tmp_path}/roles.py", "rollout.max_turns=4")
    said = dry_run("ppo", *settings, *(f"rollout.opponents.{role}={name}" for role, name in opponents.items()))
    memory = said.partition(" memory ")[2]
    weights, two = (float(memory.partition(f"{part} ")[2].split()[0]) for part in ("weights", "opponents"))
    assert two == pytest.approx(2 * weights, rel=0.05)  # in float32, as the weights in training are


MADE_UP = """
async def reset(extra_info):
    return str(extra_info["seed"])

async def step(state, action, extra_info):
    return dict(next_state=None, reward=1.0, score=1.0, done=True, extra_info=extra_info)
"""


@pytest.mark.parametrize("program", ["sft", "dpo", "rm", "spo"])
def test_an_end_token_that_the_model_does_not_have_is_refused(
    program: str, dry_run: DryRun, world: World, tmp_path: Path
) -> None:
    """The last token of a sequence is only a label, and in reinforcement learning only sampled."""
    folder = tmp_path / "model"
    shutil.copytree(world.model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end of all|>"})
    tokenizer.save_pretrained(folder)
    group = "critic" if program == "rm" else "actor"
    with pytest.raises(SystemExit) as ended:
        dry_run(program, f"{group}.model_name={folder}")
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    assert f"{program}: {group}.model_name={folder}: " in str(ended.value.code)
    assert f"token {vocabulary}" in str(ended.value.code)
    assert f"the model has {vocabulary}; the tokenizer belongs to another model" in str(ended.value.code)


@pytest.mark.parametrize("program", ["sft", "rm", "dpo", "spo"])
def test_weights_that_are_no_numbers_are_refused(program: str, world: World, dry_run: DryRun, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(world.model, folder)
    tensors = load_file(world.weights)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    group = "critic" if program == "rm" else "actor"
    with pytest.raises(SystemExit) as ended:
        dry_run(program, f"{group}.model_name={folder}")
    assert ended.value.code == (
        f"{program}: {group}.model_name={folder}: model.norm.weight in model.safetensors has values that are NaN or "
        "infinite: the weights are broken; use another checkpoint"
    )


BLOCKED = """
import time

async def step(state, action, extra_info):
    time.sleep(60)
"""


def test_a_fault_is_the_only_thing_that_is_said(
    dry_run: DryRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "env.py"
    script.write_text(BLOCKED)
    with pytest.raises(SystemExit) as ended:
        dry_run("spo", f"rollout.env_path={script}", "rollout.env_timeout_s=0.2")
    assert ended.value.code == (
        f"spo: rollout.env_path={script}, tried with the first row and the response '42': step took longer than "
        "rollout.env_timeout_s=0.2"
    )
    assert capsys.readouterr().out == ""
