"""A taskset of the package verifiers through its adapter."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from envs import verifiers_env
from envs.workers import WorkerError, Workers

pytestmark = pytest.mark.slow

TASKSET = """
import time
import verifiers.v1 as vf

class SumData(vf.TaskData):
    answer: str

class SumTask(vf.Task[SumData]):
    @vf.reward(weight=1.0)
    async def correct(self, trace: vf.Trace) -> float:
        if trace.last_reply == "hang": time.sleep(60)
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def math(self, trace: vf.Trace) -> float:
        return vf.verify_boxed_math_answer(trace.last_reply, self.data.answer)

class SumConfig(vf.TasksetConfig):
    num_tasks: int = 5

class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self):
        for i in range(self.config.num_tasks):
            yield SumTask(SumData(prompt=f"{i}+{i}?", system_prompt="Add.", answer=str(2 * i)), self.config.task)

__all__ = ["SumTaskset"]
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Install a taskset and have the adapter use it."""

    def load(source: str) -> None:
        (tmp_path / "sums.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("VERIFIERS_TASKSET", "sums")
        monkeypatch.setenv("VERIFIERS_CONFIG", '{"num_tasks": 3}')
        monkeypatch.setattr(
            verifiers_env, "taskset", Workers(verifiers_env.__file__, "make_taskset", limit_s=2, number=1, wall_s=2)
        )

    yield load
    verifiers_env.taskset.close()


def step(action: str, seed: int = 5) -> float:
    result = asyncio.run(verifiers_env.step("s", action, {"seed": seed}))
    assert (result["done"], result["next_state"], result["score"]) == (True, None, result["reward"])
    return result["reward"]


def reset(seed: int) -> list[dict[str, Any]]:
    return asyncio.run(verifiers_env.reset({"seed": seed}))


def test_tasks_and_rewards_of_a_taskset(load: Callable[[str], None]) -> None:
    load(TASKSET)
    assert reset(5) == [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2?"}]
    assert reset(3)[1] == {"role": "user", "content": "0+0?"}
    assert step("4") == 1.0
    assert step("<think>hm</think>4") == 1.0
    assert step(r"\boxed{4}") == 0.5, "a grader with a time limit of its own works"
    assert step("5") == 0.0
    with pytest.raises(WorkerError, match="took longer than 2 s"):
        step("hang")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("async def correct(self, trace: vf.Trace)", "async def correct(self, trace, runtime)", "a running program"),
        (
            "class SumTask(vf.Task[SumData]):",
            "class SumTask(vf.Task[SumData]):\n    NEEDS_CONTAINER = True",
            "a container",
        ),
        ("@vf.reward(weight=1.0)", "async def setup(self, trace, runtime): ...\n    @vf.reward", "preparations"),
        ('prompt=f"{i}+{i}?", ', "", "a user who begins"),
    ],
)
def test_what_needs_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, reason: str
) -> None:
    """Seen in this process: the library takes seconds to load."""
    (tmp_path / "sums.py").write_text(TASKSET.replace(old, new))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sums", raising=False)
    monkeypatch.setattr(verifiers_env, "TASKSET", "sums")
    with pytest.raises(ValueError, match=reason):
        verifiers_env.make_taskset()


def test_a_refusal_comes_out_of_the_worker(load: Callable[[str], None]) -> None:
    load(TASKSET.replace("range(self.config.num_tasks)", "()"))
    with pytest.raises(WorkerError, match="holds no task"):
        reset(1)
