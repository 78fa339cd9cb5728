"""A user's script may do anything; a call of it ends, and says why there is no reward."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from RL2.config.scripts import ScriptError, load_script
from RL2.data.tool_calls import ToolCall
from RL2.rollout.environment import ATTEMPTS, Environment, StepResult, Unscored, load_environment
from RL2.types import Sampling

LIMIT = 0.2
RESULT = '{"next_state": None, "reward": 1.0, "score": 2, "done": True, "extra_info": extra_info}'

Load = Callable[..., Environment]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Write a script, load it, close it at the end."""
    loaded: list[Environment] = []

    def load(source: str, timeout_s: float = LIMIT) -> Environment:
        path = tmp_path / f"script{len(loaded)}.py"
        path.write_text(source)
        loaded.append(load_environment(path, timeout_s))
        return loaded[-1]

    yield load
    for environment in loaded:
        environment.close()


def body(*lines: str) -> str:
    return "\n    ".join(["async def step(state, action, extra_info):", *lines]) + "\n"


def step(environment: Environment, action: str = "a", extra_info: dict[str, Any] | None = None) -> StepResult:
    return asyncio.run(environment.step("s", action, {} if extra_info is None else extra_info))


def cause(environment: Environment) -> str:
    with pytest.raises(Unscored) as caught:
        step(environment)
    return caught.value.cause


async def outcomes(environment: Environment, actions: list[str]) -> list[float | str]:
    """The reward of each call, or why there is none; all calls at once."""
    results = await asyncio.gather(*[environment.step("s", a, {}) for a in actions], return_exceptions=True)
    return [result.reward if isinstance(result, StepResult) else str(result) for result in results]


def test_a_result_comes_back_checked(load: Load) -> None:
    result = step(load(body(f"return {RESULT}")), extra_info={"answer": 42})
    assert result == StepResult(next_state=None, reward=1.0, score=2.0, done=True, extra_info={"answer": 42})
    assert type(result.score) is float


def test_numpy_numbers_are_numbers(load: Load) -> None:
    assert step(load("import numpy\n" + body(f"return {RESULT} | {{'reward': numpy.float32(0.5)}}"))).reward == 0.5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def step(:\n", r"cannot be imported: SyntaxError: .*script0.py:1\)"),
        ("import os\n1 / 0\n", r"cannot be imported: ZeroDivisionError: division by zero \(.*script0.py:2\)"),
        ("import no_such_module_here\n", "cannot be imported: ModuleNotFoundError"),
        ("x = 1\n", "has no `async def step"),
        ("def step(state, action, extra_info): ...\n", "step must be `async def step"),
        ("step = 3\n", "step must be `async def step"),
        ("async def step(state, action): ...\n", "too many positional arguments"),
        ("async def step(state, action, extra_info, more): ...\n", "missing a required argument: 'more'"),
        (body("...") + "def reset(extra_info): ...\n", "reset must be `async def reset"),
        (body("...") + "async def reset(): ...\n", "reset must be `async def reset"),
        (body("...") + "async def example(row): ...\n", "example must be `def example"),
    ],
)
def test_a_script_that_cannot_be_used_is_refused(load: Load, source: str, message: str) -> None:
    with pytest.raises(ScriptError, match=message):
        load(source)


def test_files_that_are_no_scripts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match="no such file"):
        load_environment(tmp_path / "missing.py", LIMIT)
    (tmp_path / "data.txt").write_text("x")
    with pytest.raises(ScriptError, match="not a Python file"):
        load_environment(tmp_path / "data.txt", LIMIT)


def test_a_script_may_define_dataclasses(load: Load) -> None:
    """They look their module up by its name."""
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    assert step(load(source + body(f"return {RESULT} | {{'reward': A(3).x}}"))).reward == 3


def test_optional_functions(load: Load) -> None:
    bare = load(body(f"return {RESULT}"))
    assert not bare.has_reset
    assert bare.example is None
    source = (
        "async def reset(extra_info):\n    extra_info['seen'] = 1\n    return 'go'\ndef example(row):\n    return row\n"
    )
    full = load(body(f"return {RESULT}") + source)
    extra_info: dict[str, Any] = {}
    assert asyncio.run(full.reset(extra_info)) == "go"
    assert extra_info == {"seen": 1}
    assert full.example is not None
    assert full.example({"a": 1}) == {"a": 1}
    with pytest.raises(Unscored, match="reset returned None; expected a str or a list of messages"):
        asyncio.run(load(body("...") + "async def reset(extra_info): ...\n").reset({}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("{'reward': '1'}", "step returned reward=a str; expected a number or a bool"),
        ("{'reward': [1]}", "step returned reward=a list; expected a number or a bool"),
        ("{'score': None}", "step returned score=None; expected a number or a bool"),
        ("{'reward': float('nan')}", "step returned reward=nan; expected a finite number"),
        ("{'score': float('-inf')}", "step returned score=-inf; expected a finite number"),
        ("{'reward': 10**400}", "step returned reward=inf; expected a finite number"),
        ("{'reward': 1e308}", "step returned reward=1e+308; expected a number of at most 1e+15 in size"),
        ("{'score': -1e39}", "step returned score=-1e+39; expected a number of at most 1e+15 in size"),
        ("{'done': 1}", "step returned done=an int; expected a bool"),
        ("{'done': False}", "step returned next_state=None with done=False"),
        ("{'next_state': 3}", "step returned next_state=an int; expected a str, a list of messages or None"),
        ("{'next_state': ['a']}", "step returned next_state=a list; expected a str, a list of messages or None"),
        ("{'train': 1}", "step returned train=an int; expected a bool"),
        ("{'extra_info': None}", "step returned extra_info=None; expected a dict"),
    ],
)
def test_a_wrong_result_is_unscored(load: Load, changes: str, expected: str) -> None:
    assert cause(load(body(f"return {RESULT} | {changes}"))) == expected


def test_a_script_that_asks_is_told_the_sampling_arguments(load: Load) -> None:
    source = body("extra_info['temperature'] = sampling['temperature']", f"return {RESULT}")
    reset = "async def reset(extra_info, sampling):\n    return str(sampling['max_new_tokens'])\n"
    environment = load(source.replace("extra_info)", "extra_info, sampling)", 1) + reset)
    sampling = Sampling(max_new_tokens=7, temperature=0.5)
    assert asyncio.run(environment.step("s", "a", {}, sampling)).extra_info == {"temperature": 0.5}
    assert asyncio.run(environment.reset({}, sampling)) == "7"
    assert asyncio.run(load(body(f"return {RESULT}")).step("s", "a", {}, sampling)).reward == 1.0


def test_a_script_that_asks_is_told_the_calls(load: Load) -> None:
    source = body("extra_info['calls'] = calls", f"return {RESULT}").replace("extra_info)", "extra_info, calls)", 1)
    environment = load(source)
    assert environment.wants_calls and not load(body(f"return {RESULT}")).wants_calls
    calls = [ToolCall("f", {"x": 1}), ToolCall("", {}, "it has no name of a tool", "{}")]
    told = asyncio.run(environment.step("s", "a", {}, None, calls)).extra_info["calls"]
    assert told == [
        {"name": "f", "arguments": {"x": 1}, "error": None},
        {"name": "", "arguments": {}, "error": "it has no name of a tool"},
    ]


def test_a_script_may_import_its_siblings(load: Load, tmp_path: Path) -> None:
    (tmp_path / "sibling.py").write_text("from .other import x\n")
    (tmp_path / "other.py").write_text("x = 0.25\n")
    (tmp_path / "json.py").write_text("raise AssertionError('shadows a library')\n")
    source = "import json\nfrom .sibling import x\n" + body(f"return {RESULT} | {{'reward': x}}")
    assert step(load(source)).reward == 0.25
    with pytest.raises(ScriptError, match="cannot be imported: ModuleNotFoundError: No module named"):
        load("from .missing import x\n" + body("..."))


def test_each_load_has_its_own_siblings(load: Load, tmp_path: Path) -> None:
    """An error class that two siblings share is the same class for both, also after another load of one of them."""
    (tmp_path / "errors.py").write_text("class Refused(Exception):\n    pass\n")
    (tmp_path / "caller.py").write_text("from .errors import Refused\ndef call():\n    raise Refused\n")
    answer = f"return {RESULT}"
    source = "from .caller import call\nfrom .errors import Refused\n" + body(
        "try:", "    call()", "except Refused:", f"    {answer}"
    )
    first = load(source)
    load_script(tmp_path / "errors.py")
    assert step(load(source)).reward == 1.0
    assert step(first).reward == 1.0


def test_no_result_is_unscored(load: Load) -> None:
    assert cause(load(body("return None"))) == "step returned None; expected a dict"
    assert cause(load(body("return {'reward': 1, 'next_state': None}"))) == "step returned no score, done, extra_info"


def test_an_exception_is_unscored_and_located(load: Load) -> None:
    environment = load(body("import json", "return json.loads('{')"))
    assert cause(environment).startswith("JSONDecodeError: Expecting property name")
    assert cause(environment).endswith("script0.py:3)")


@pytest.mark.parametrize("error", ["SystemExit(1)", "KeyboardInterrupt()", "StopIteration()"])
def test_nothing_that_a_script_raises_stops_its_thread(load: Load, error: str) -> None:
    environment = load(body(f"if action == 'bad': raise {error}", f"return {RESULT}"))
    first, second = asyncio.run(outcomes(environment, ["bad", "good"]))
    assert isinstance(first, str)
    assert second == 1.0


def test_calls_share_one_loop_beside_the_callers(load: Load) -> None:
    source = "import asyncio, threading\n" + body(
        "extra_info['loop'] = id(asyncio.get_running_loop())",
        "extra_info['thread'] = threading.current_thread().name",
        f"return {RESULT}",
    )
    environment = load(source)
    first, second = step(environment).extra_info, step(environment).extra_info
    assert first == second
    assert first["thread"] == "environment" != threading.current_thread().name


def test_waiting_calls_overlap(load: Load) -> None:
    environment = load("import asyncio\n" + body("await asyncio.sleep(0.2)", f"return {RESULT}"), timeout_s=60)
    start = time.perf_counter()
    assert asyncio.run(outcomes(environment, ["a"] * 50)) == [1.0] * 50
    assert time.perf_counter() - start < 5


OVERTIME = f"step took longer than rollout.env_timeout_s={LIMIT}"


@pytest.mark.parametrize(
    "wait",
    [
        "await asyncio.sleep(30)",
        "await asyncio.shield(asyncio.sleep(30))",
        "\n        try: await asyncio.sleep(30)\n        except asyncio.CancelledError: await asyncio.sleep(30)",
    ],
    ids=["plain", "shielded", "swallows its cancellation"],
)
def test_a_call_that_waits_too_long_is_unscored_alone(load: Load, wait: str) -> None:
    environment = load("import asyncio\n" + body(f"if action == 'slow': {wait}", f"return {RESULT}"))
    assert asyncio.run(outcomes(environment, ["a", "slow", "b"])) == [1.0, OVERTIME, 1.0]
    thread = environment._thread
    assert step(environment).reward == 1.0
    assert environment._thread is thread, "a loop that is alive is kept"


@pytest.mark.parametrize("block", ["time.sleep(0.4)", "\n        while True: pass"], ids=["sleeps", "spins"])
def test_a_call_that_blocks_is_unscored_and_those_behind_it_are_not(load: Load, block: str) -> None:
    environment = load("import time\n" + body(f"if action == 'block': {block}", f"return {RESULT}"))
    step(environment)
    thread = environment._thread
    assert thread is not None
    assert asyncio.run(outcomes(environment, ["a", "block", "b", "c"])) == [1.0, OVERTIME, 1.0, 1.0]
    thread.join(timeout=2)
    assert not thread.is_alive(), "what was left behind does not spin for ever"


def test_calls_behind_a_blocked_one_run_once(load: Load, tmp_path: Path) -> None:
    """The abandoned loop comes to itself later and must not run them again."""
    log = tmp_path / "log"
    environment = load(
        "import time\n"
        + body(
            f"with open({str(log)!r}, 'a') as file: file.write(action)",
            "if action == 'B': time.sleep(0.4)",
            f"return {RESULT}",
        )
    )

    async def main() -> list[float | str]:
        results = await outcomes(environment, ["B", "x", "y"])
        await asyncio.sleep(0.3)
        return results

    assert asyncio.run(main()) == [OVERTIME, 1.0, 1.0]
    assert sorted(log.read_text()) == ["B", "x", "y"], "each once; in which order they go on is left to the scheduler"


def test_time_spent_in_the_queue_does_not_count(load: Load) -> None:
    environment = load("import time\n" + body("time.sleep(0.05)", f"return {RESULT}"))
    assert asyncio.run(outcomes(environment, ["a"] * 10)) == [1.0] * 10


def test_a_busy_caller_blames_nobody(load: Load) -> None:
    """The engine decodes in the caller's loop and looks up only now and then."""
    environment = load(body(f"return {RESULT}"))

    async def main() -> float:
        call = asyncio.create_task(environment.step("s", "a", {}))
        await asyncio.sleep(0)
        time.sleep(2 * LIMIT)
        return (await call).reward

    step(environment)
    thread = environment._thread
    assert asyncio.run(main()) == 1.0
    assert environment._thread is thread


def test_retries_are_bounded(load: Load) -> None:
    environment = load("import time\n" + body("time.sleep(0.5)", f"return {RESULT}"), timeout_s=0.1)
    results = asyncio.run(outcomes(environment, ["a"] * (ATTEMPTS + 1)))
    assert set(results) == {
        "step took longer than rollout.env_timeout_s=0.1",
        f"{ATTEMPTS} times, other calls blocked longer than rollout.env_timeout_s=0.1",
    }


def test_a_background_task_that_blocks_does_not_hang_the_next_call(load: Load) -> None:
    """No call is to blame, and still somebody has to notice."""
    environment = load(
        "import asyncio, time\nasync def hog():\n    await asyncio.sleep(0)\n    while True: pass\n"
        + body("if action == 'spawn': extra_info['task'] = asyncio.create_task(hog())", f"return {RESULT}")
    )
    assert step(environment, "spawn").reward == 1.0
    assert step(environment, "after").reward == 1.0


def test_a_cancelled_caller_leaves_the_environment_usable(load: Load) -> None:
    environment = load("import asyncio\n" + body("if action == 'slow': await asyncio.sleep(9)", f"return {RESULT}"))

    async def main() -> None:
        call = asyncio.create_task(environment.step("s", "slow", {}))
        await asyncio.sleep(0.02)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    assert step(environment).reward == 1.0


def test_close_ends_the_thread(load: Load) -> None:
    environment = load("import time\n" + body("if action == 'block': time.sleep(0.5)", f"return {RESULT}"))
    environment.close()  # before it was ever used
    step(environment)
    thread = environment._thread
    assert thread is not None
    environment.close()
    assert not thread.is_alive()
    assert step(environment).reward == 1.0, "a closed environment starts again when it is asked"


def test_a_call_costs_little(load: Load) -> None:
    environment = load(body(f"return {RESULT}"), timeout_s=60)
    start = time.process_time()
    assert asyncio.run(outcomes(environment, ["a"] * 512)) == [1.0] * 512
    assert time.process_time() - start < 2, "0.05 s on an idle machine"
