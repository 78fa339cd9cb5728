"""Answers are compared as mathematics, in processes that die when they must."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from envs import orz
from envs.workers import WorkerError, Workers
from RL2.rollout.environment import Unscored, load_environment


@pytest.fixture(autouse=True, scope="module")
def _workers_end() -> Iterator[None]:
    yield
    orz.grade.close()


def reward(action: str, gold: Any = "12") -> float:
    result = asyncio.run(orz.step("q", action, {"answer": gold}))
    assert result["reward"] == result["score"]
    assert (result["next_state"], result["done"], result["extra_info"]) == (None, True, {"answer": gold})
    return result["reward"]


@pytest.mark.parametrize(
    ("action", "gold"),
    [
        (r"so \boxed{12}.", 12),
        (r"\boxed{ 12.0 }", "12"),
        ("<answer>12</answer>", "12"),
        (r"<answer>It is \boxed{12}</answer>", "12"),
        (r"<think>\boxed{5}</think>\boxed{12}", "12"),
        (r"\boxed{5} no \boxed{12}", "12"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{(a+b)^2}", "a^2+2ab+b^2"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{\text{A}}", "A"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1\,234}", "1234"),
        (r"\boxed{1 234}", "1234"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{50\%}", "0.5"),
        (r"\boxed{50\%}", r"\frac{1}{2}"),
        (r"\boxed{50\%}", r"50\%"),
        (r"\boxed{50}", r"50\%"),
        (r"\boxed{\frac12}", r"50\%"),
        (r"\boxed{12.5\%}", r"\frac{1}{8}"),
    ],
)
def test_right(action: str, gold: Any) -> None:
    assert reward(action, gold) == 1.0


@pytest.mark.parametrize(
    "action",
    [
        "",
        "12",
        r"\boxed{}",
        r"\boxed{12",
        r"\boxed{312}",
        r"\boxed{5 or 12}",
        r"\boxed{1,2,12}",
        r"\boxed{12} \boxed{1}",
        r"\boxed{maybe 12}",
        r"\boxed{12}</think>",
        r"\boxed{12}<answer>5</answer>",
        r"<answer>\boxed{12}",
        r"\boxed{__import__('os').getpid()}",
        "\\boxed{\N{FULLWIDTH DIGIT ONE}\N{FULLWIDTH DIGIT TWO}}",
        r"\boxed{" + "1" * 501 + "}",
        r"\boxed{" + "{" * 3 + "}" * 3 + "}",
    ],
)
def test_wrong(action: str) -> None:
    assert reward(action) == 0.0


@pytest.mark.parametrize(
    ("action", "gold"),
    [
        (r"\boxed{50\%}", "5"),
        (r"\boxed{5000\%}", r"50\%"),
        (r"\boxed{0.5}", "50"),
        (r"\boxed{1 2}", "12"),
    ],
)
def test_a_percentage_or_a_space_is_no_other_number(action: str, gold: str) -> None:
    assert reward(action, gold) == 0.0


def test_a_gold_answer_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(WorkerError, match="the answer '' of the data set cannot be read"):
        reward(r"\boxed{12}", "")


@pytest.mark.slow
def test_an_answer_that_explodes_is_unscored_and_the_next_one_is_graded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orz, "grade", Workers(orz.__file__, "make_grader", limit_s=1, number=1))
    try:
        with pytest.raises(WorkerError, match=r"took longer than 1 s of processor time and was killed"):
            reward(r"\boxed{9^{9^{9^9}}}")
        assert reward(r"\boxed{12}") == 1.0
    finally:
        orz.grade.close()


@pytest.mark.slow
def test_a_killed_grader_is_the_cause_of_an_unscored_trajectory(tmp_path: Path) -> None:
    """The whole way: script, workers, and what the episode is told."""
    source = Path(orz.__file__).read_text().replace("limit_s=5", "limit_s=1")
    (tmp_path / "quick.py").write_text(source)
    for name in ("workers.py", "gsm8k.py"):
        (tmp_path / name).write_text(Path(orz.__file__).with_name(name).read_text())
    environment = load_environment(tmp_path / "quick.py", 60)
    assert asyncio.run(environment.step("q", r"\boxed{12}", {"answer": "12"})).reward == 1.0
    cause = r"^WorkerError: took longer than 1 s of processor time and was killed \(.*quick\.py:\d+\)$"
    with pytest.raises(Unscored, match=cause):
        asyncio.run(environment.step("q", r"\boxed{9^{9^{9^9}}}", {"answer": "12"}))
    environment.close()


@pytest.mark.parametrize("unit", ["\\boxed{", "{", "}", "<answer>", "</think>", "1"])
def test_a_megabyte_is_graded_at_once(unit: str) -> None:
    start = time.process_time()
    assert reward("\\boxed{" + unit * (1_000_000 // len(unit))) == 0.0
    assert time.process_time() - start < 2


def test_example_makes_a_chat_of_a_raw_row() -> None:
    for row in (
        {"question": "How many?", "answer": 12},
        {"problem": "How many?", "answer": "12"},
        {"problem": "How many?", "answer": "12", "messages": [{"role": "assistant", "content": "12"}]},
        {"0": {"from": "human", "value": "How many?"}, "1": {"ground_truth": {"value": "12"}}},
    ):
        made = orz.example(row)
        assert made["extra_info"] == {"answer": "12"}
        assert made["messages"][0]["content"].startswith("How many?\n")
        assert orz.example(made) is made
    assert orz.example({"prompt": "q", "answer": 12})["extra_info"] == {"answer": "12"}


SCRIPT = """
import os, time

def make():
    def run(what, value=None):
        if what == "fail": raise ValueError(f"no {value}")
        if what == "exit": raise SystemExit(3)
        if what == "die": os._exit(3)
        if what == "sleep": time.sleep(60)
        if what == "nap": time.sleep(0.5)
        if what == "spin":
            while True: pass
        if what == "hog": "a" * (8 << 30)
        if what == "odd": return {1}
        if what == "print": print("noise", flush=True); os.system("echo more noise")
        return os.getpid() if what == "pid" else value
    return run

def broken():
    import no_such_library
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_workers_are_kept_and_replaced_when_they_die(script: str) -> None:
    run = Workers(script, "make", limit_s=0.1, number=1, wall_s=5)
    before = len(psutil.Process().children())

    async def main() -> None:
        first = await run("pid")
        assert first != os.getpid()
        assert await run("value", {"a": [1, "\ud800", None]}) == {"a": [1, "\ud800", None]}
        for what, cause in {
            "fail": "ValueError: no x",
            "exit": "SystemExit: 3",
            "hog": "MemoryError",
            "odd": "TypeError: Object of type set is not JSON serializable",
        }.items():
            with pytest.raises(WorkerError, match=cause):
                await run(what, "x")
        assert await run("print", "x") == "x"
        assert await run("pid") == first
        for what, cause in {
            "die": "its process died .exit code 3",
            "spin": "took longer than 0.1 s of processor time",
            "sleep": "took longer than 5 s and",
        }.items():
            with pytest.raises(WorkerError, match=cause):
                await run(what)
            assert await run("value", "x") == "x"
        assert await run("pid") != first

    asyncio.run(main())
    assert len(psutil.Process().children()) == before + 1, "the dead are buried"
    run.close()
    assert len(psutil.Process().children()) == before


def test_a_call_that_waits_for_the_processor_is_not_late(script: str) -> None:
    """A grader that works for less than its limit answers however long the machine takes over it."""
    run = Workers(script, "make", limit_s=0.2, number=1)
    assert asyncio.run(run("nap", "x")) == "x"
    run.close()


def test_no_more_workers_than_asked_for(script: str) -> None:
    run = Workers(script, "make", limit_s=5, number=2)

    async def main() -> list[int]:
        return await asyncio.gather(*[run("pid") for _ in range(50)])

    assert len(set(asyncio.run(main()))) <= 2
    run.close()


def test_a_script_that_cannot_be_loaded_says_so(script: str) -> None:
    run = Workers(script, "broken", limit_s=5, number=1)
    with pytest.raises(WorkerError, match="ModuleNotFoundError: No module named 'no_such_library'"):
        asyncio.run(run())
    run.close()


@pytest.mark.slow
def test_workers_end_with_their_parent_even_if_it_is_killed(script: str) -> None:
    source = f"""
        import asyncio, os, signal, sys
        from envs.workers import Workers
        idle, busy = (Workers({script!r}, "make", limit_s=0.5, number=1) for _ in range(2))
        async def main():
            print(await idle("pid"), await busy("pid"), flush=True)
            await busy("spin")
        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        time.sleep(0.1)
        parent.send_signal(signal.SIGKILL)
    assert len(workers) == 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
