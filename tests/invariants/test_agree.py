"""Processes that were given different things stop at the start, on every rank, with what differs and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from pools import in_pool
from safetensors.torch import load_file, save_file

from RL2.config.load import load
from RL2.errors import ConfigError
from RL2.parallel.agree import _difference, refuse_differences
from RL2.parallel.processes import Processes
from RL2.tools.reproduce.model import build_model
from RL2.tools.reproduce.problems import Demonstrator, draw_problems
from RL2.trainer.inputs import evenly_spaced, facts, of_prompts, of_tensors, refuse_other_replicas
from RL2.types import Prompt
from RL2.workers.learner import Learner


def refused(processes: Processes, given: dict[str, str]) -> str:
    try:
        refuse_differences(processes, given)
    except ConfigError as error:
        return str(error)
    return ""


def agree(folder: Path, processes: Processes) -> list[str]:
    rank = processes.rank
    config: Any = load(
        "sft",
        [
            *(f"actor.model_name={folder}/model", "actor.ddp_size=2", "actor.max_length_per_device=99"),
            *("data.path=x", "data.max_length=99", "data.batch_size=2", "trainer.experiment_name=x"),
            *("trainer.max_steps=1", f"trainer.save_dir={folder}"),
        ],
    )
    learner = Learner(config.actor, processes, 1, folder)
    refuse_other_replicas(processes, learner, "actor")
    if rank == 1:
        with torch.no_grad():
            next(learner.policy.parameters()).mul_(1.0001)
    try:
        refuse_other_replicas(processes, learner, "actor")
        replicas = ""
    except ConfigError as error:
        replicas = str(error)
    return [
        refused(processes, {"a": "1", "b": "2"}),
        refused(processes, {"a": "1", "b": "two" if rank == 1 else "2"}),
        refused(processes, {"of the first alone": "1"} if rank == 0 else {}),
        refused(processes, {str(number): str(rank) for number in range(9)}),
        replicas,
    ]


@pytest.mark.slow
def test_what_differs_is_said_on_every_rank(tmp_path: Path) -> None:
    rng = Random(0)
    texts = [Demonstrator().solve(problem, rng) for problem in draw_problems(rng, 20, held_out=False)]
    build_model(tmp_path / "model", texts, seed=0)
    first, other = in_pool(agree, tmp_path, 2)
    assert other == first
    same, one, alone, many, replicas = first
    assert same == alone == ""
    assert "b is two on rank 1 and 2 on rank 0;" in one
    assert "; and 6 more; give all the same" in many
    assert "the weights of actor, part (0, 0) is " in replicas and " on rank 1 and " in replicas


def test_most_processes_are_right_and_of_equals_the_first() -> None:
    assert _difference("lr", ["1", "1", None]) == ""
    assert _difference("lr", ["1", "2", "2"]) == "lr is 1 on rank 0 and 2 on rank 1"
    assert _difference("lr", [None, "1", "2"]) == "lr is 2 on rank 2 and 1 on rank 1"
    assert _difference("lr", ["1", "2", "1", "2", "1"]) == "lr is 2 on ranks 1, 3 and 1 on rank 0"


def settings(folder: Path) -> dict[str, Any]:
    return {
        "actor": {"model_name": f"{folder}/model", "lr": 1e-3, "objective": f"{folder}/mine.py:focal"},
        "train_data": {"path": f"{folder}/train.jsonl"},
        "test_data": {"path": f"test@{folder}/rows:main"},
        "rollout": {"env_path": f"{folder}/e.py"},
        "trainer": {"save_dir": str(folder)},
    }


@pytest.fixture
def given(tmp_path: Path) -> Path:
    for folder in ("model", "rows"):
        (tmp_path / folder).mkdir()
    for name in ("train.jsonl", "e.py", "mine.py", "model/tokenizer.json", "rows/test.parquet"):
        (tmp_path / name).write_text("0123456789")
    save_file({"w": torch.zeros(2**25)}, tmp_path / "model" / "model.safetensors")  # of 128 MiB, read in pieces
    return tmp_path


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("train.jsonl", "train_data.path"),
        ("e.py", "rollout.env_path"),
        ("mine.py", "actor.objective"),
        ("model/tokenizer.json", "actor.model_name"),
        ("rows/test.parquet", "test_data.path"),
    ],
)
def test_other_files_are_other_facts(file: str, key: str, given: Path) -> None:
    before = facts(settings(given), files=True)
    (given / file).write_text("0123456780")
    (given / "model" / "README.md").write_text("of no effect")
    after = facts(settings(given), files=True)
    assert {name for name in before if before[name] != after[name]} == {f"the content of {key}"}
    assert before.keys() == after.keys()


def test_other_weights_of_the_same_shapes_are_other_facts(given: Path) -> None:
    before, file = facts(settings(given), files=True), given / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({"w": weights["w"] + 1e-6}, file)
    after = facts(settings(given), files=True)
    assert {name for name in before if before[name] != after[name]} == {"the content of actor.model_name"}
    shutil.rmtree(given / "model")
    assert "the content of actor.model_name" not in facts(settings(given), files=True)


def test_settings_are_facts_on_every_rank_and_files_on_one_of_a_machine(given: Path) -> None:
    found = facts(settings(given), files=False)
    assert found["actor.lr"] == json.dumps(1e-3)
    assert not any(name.startswith("the content") for name in found)
    with_files = facts(settings(given), files=True)
    assert with_files.items() >= found.items()
    assert {"the code of RL2", "torch", "transformers"} <= with_files.keys()
    assert "the content of trainer.save_dir" not in with_files


def test_rows_differ_in_number_order_and_content() -> None:
    prompts = [Prompt(n, str(n), [n, 5], {"answer": n}) for n in range(1000)]
    found = of_prompts(prompts)
    assert found.startswith("1000 rows ")
    assert of_prompts([Prompt(n, str(n), [n, 5], {"answer": n}) for n in range(1000)]) == found
    assert of_prompts(prompts[:-1]) != found
    assert of_prompts(prompts[::-1]) != found
    assert of_prompts([Prompt(n, str(n), [n, 5], {"answer": n + 1}) for n in range(1000)]) != found
    assert of_tensors(3, {"a": torch.arange(3)}) != of_tensors(3, {"a": torch.arange(3) + 1})
    assert of_tensors(3, {"a": torch.tensor(True)}) != of_tensors(3, {"b": torch.tensor(True)})
    assert evenly_spaced(1000)[0] == 0 and evenly_spaced(1000)[-1] == 999 and evenly_spaced(2) == [0, 1]
