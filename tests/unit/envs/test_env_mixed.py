"""Each row is judged by the environment that it names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from RL2.rollout.environment import Environment, ScriptError, load_environment
from RL2.types import Sampling

ENVS = Path(__file__).parents[3] / "envs"


@pytest.fixture
def mixed() -> Iterator[Environment]:
    environment = load_environment(ENVS / "mixed.py", 5)
    yield environment
    environment.close()


def test_rows_go_through_their_own_environments(mixed: Environment) -> None:
    assert mixed.example is not None
    rows: list[dict[str, Any]] = [
        {"env": "gsm8k", "question": "How many?", "answer": "6*2=12\n#### 12", "target": None, "nums": None},
        {"env": "countdown", "question": None, "answer": None, "target": 98, "nums": [44, 19, 35]},
        {"env": "calculator", "prompt": "How many?", "extra_info": '{"answer": "12"}'},
    ]
    made = [mixed.example(row) for row in rows]
    assert [row["extra_info"] for row in made] == [
        {"answer": "12", "env": "gsm8k"},
        {"target": 98, "nums": [44, 19, 35], "env": "countdown"},
        {"answer": "12", "env": "calculator"},
    ]
    sampling = Sampling(max_new_tokens=8)
    for row, action in zip(made, ["#### 12", "<answer>44+19+35</answer>", "#### 12"], strict=True):
        result = asyncio.run(mixed.step("q", action, row["extra_info"], sampling))
        assert (result.reward, result.done) == (1.0, True)
        assert asyncio.run(mixed.step("q", "12", row["extra_info"], sampling)).reward == 0.0
    turn = asyncio.run(mixed.step("q", "<calc>6*2</calc>", made[2]["extra_info"], sampling))
    assert turn.next_state == "q<calc>6*2</calc><result>12</result>"
    assert turn.extra_info["env"] == "calculator"


def test_a_name_that_is_no_environment_is_an_error(mixed: Environment) -> None:
    assert mixed.example is not None
    for name in ("no_such", "mixed", "../envs/gsm8k", "os"):
        with pytest.raises(ValueError, match=r"there is no environment .* beside mixed\.py; there are arithmetic, "):
            mixed.example({"env": name, "prompt": "q"})
    with pytest.raises(ValueError, match=r"arithmetic\.py has no `step`"):
        mixed.example({"env": "arithmetic", "prompt": "q"})


@pytest.mark.parametrize("script", sorted(path.stem for path in ENVS.glob("*.py")))
def test_every_script_loads_or_says_what_it_needs(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REWARD_MODEL", raising=False)
    monkeypatch.delenv("JUDGE_URL", raising=False)
    monkeypatch.delenv("TOOLS", raising=False)
    helpers = {"arithmetic", "workers", "local_search_service", "sandbox", "sandbox_child", "sandbox_kernel"}
    helpers |= {"solution_calls", "plain", "judge_client", "variables", "mcp_servers", "questions", "tool_turns"}
    libraries = {"gem": "gem", "reasoning_gym": "reasoning_gym", "verifiers_env": "verifiers", "orz": "math_verify"}
    library = libraries.get(script)
    if script in helpers:
        with pytest.raises(ScriptError, match="has no `async def step"):
            load_environment(ENVS / f"{script}.py", 5)
    elif library is not None and find_spec(library) is None:
        with pytest.raises(ScriptError, match=r"pip install 'rl2-spo\[(gem|reasoning-gym|verifiers|math)\]'"):
            load_environment(ENVS / f"{script}.py", 5)
    elif script in ("debate", "kuhn_poker"):
        assert len(load_environment(ENVS / f"{script}.py", 5, with_roles=True).roles) >= 2
    elif script == "code":
        try:
            load_environment(ENVS / f"{script}.py", 5).close()
        except ScriptError as error:
            assert "programs cannot be locked down here" in str(error)  # noqa: PT017
    elif script == "judge":
        with pytest.raises(ScriptError, match="JUDGE_URL is not set; it names the server"):
            load_environment(ENVS / f"{script}.py", 5)
    elif script == "reward_model":
        with pytest.raises(ScriptError, match="REWARD_MODEL is not set; it names the reward model"):
            load_environment(ENVS / f"{script}.py", 5)
    elif script == "tools":
        with pytest.raises(ScriptError, match="TOOLS is not set; it names files of functions or MCP servers"):
            load_environment(ENVS / f"{script}.py", 5)
    else:
        load_environment(ENVS / f"{script}.py", 5).close()
