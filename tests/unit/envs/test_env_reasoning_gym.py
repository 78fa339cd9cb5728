"""Reasoning Gym through its adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from envs import reasoning_gym as adapter
from envs.workers import WorkerError, Workers


@pytest.fixture(autouse=True, scope="module")
def _workers_end() -> Iterator[None]:
    yield
    adapter.gym.close()


def task(dataset: str = "chain_sum", seed: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """The episode's notes, and the task as the library makes it."""
    extra_info = {"seed": seed, "dataset": dataset}
    (message,) = asyncio.run(adapter.reset(extra_info))
    entry = reasoning_gym.create_dataset(dataset, seed=seed, size=1)[0]
    assert message == {"role": "user", "content": entry["question"] + adapter.INSTRUCTION}
    return extra_info, entry


def step(extra_info: dict[str, Any], answer: str) -> tuple[float, float]:
    result = asyncio.run(adapter.step("s", f"<think>1</think><answer>{answer}</answer>", extra_info))
    assert (result["done"], result["next_state"]) == (True, None)
    return result["reward"], result["score"]


@pytest.mark.parametrize(
    "dataset",
    ["chain_sum", "simple_integration", "countdown", "spiral_matrix", "n_queens"],
)
def test_the_right_answer_and_a_wrong_one(dataset: str) -> None:
    extra_info, entry = task(dataset)
    assert step(extra_info, entry["answer"].strip()) == (1.0, 1.0)
    reward, score = step(extra_info, "0")
    assert reward == 0.0
    assert score < 0.1


@pytest.mark.slow
def test_all_workers_make_the_same_task_of_a_seed() -> None:
    """This data set goes over Python sets, whose order is another one in each process unless that is prevented."""
    questions = set()
    for _ in range(2):
        gym = Workers(adapter.__file__, "make_gym", limit_s=10, number=1)
        questions.add(asyncio.run(gym("polynomial_multiplication", {}, 3)))
        gym.close()
    assert len(questions) == 1
    extra_info, entry = task()
    extra_info["question"] = "another"
    with pytest.raises(WorkerError, match="another task of the same seed"):
        step(extra_info, entry["answer"])


def test_partial_credit_is_no_reward() -> None:
    extra_info, entry = task()
    reward, score = step(extra_info, entry["answer"] + " or so")
    assert reward == 0.0
    assert 0 < score < 1


@pytest.mark.parametrize("dataset", ["spiral_matrix", "simple_integration", "countdown", "n_queens", "puzzle24"])
def test_no_answer_is_run(dataset: str, tmp_path: Path) -> None:
    extra_info, _ = task(dataset)
    mark = tmp_path / "run"
    for attack in (
        f"open({str(mark)!r}, 'w')",
        f"[__import__('os').system('touch {mark}')]",
        f"[(lambda: open('{mark}', 'w'))()]",
        f"x.__class__.__init__.__globals__['open']('{mark}','w')",
    ):
        assert step(extra_info, attack)[0] == 0.0
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("[1, 2, 'a']", True),
        ("x**2/2 + sin(x)*3.5 + C", True),
        ("(1+2)*3", True),
        ("print(1)", False),
        ("x.y", False),
        ("(x).y", False),
        ("1 .y", False),
        ("exec(x)", False),
        ("open", False),
        ("[x for x in 'a']", False),
        ("__import__", False),
        ("'a'.join", False),
    ],
)
def test_harmless(text: str, harmless: bool) -> None:
    assert adapter.is_harmless(text) is harmless


@pytest.mark.slow
def test_an_answer_that_explodes_is_unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    extra_info, _ = task("simple_integration")
    monkeypatch.setattr(adapter, "gym", Workers(adapter.__file__, "make_gym", limit_s=1, number=1))
    with pytest.raises(WorkerError, match="took longer than 1 s of processor time"):
        step(extra_info, "9**9**9**9")
    adapter.gym.close()


def test_an_unknown_data_set_is_named() -> None:
    with pytest.raises(WorkerError, match="Dataset 'no_such' not registered"):
        asyncio.run(adapter.reset({"seed": 1, "dataset": "no_such"}))
