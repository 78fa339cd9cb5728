"""A script with several roles runs until it waits for answers, whatever it does in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from RL2.config.scripts import ScriptError
from RL2.rollout.environment import Environment, load_environment
from RL2.rollout.game import GameResult, Said
from RL2.rollout.step_result import Unscored

ROLES = "ROLES = {'a': 'You are a.', 'b': ''}\n"
Load = Callable[..., Environment]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """An environment of a script with the roles a and b."""
    loaded: list[Environment] = []

    def make(body: str, roles: str = ROLES, timeout_s: float = 20) -> Environment:
        path = tmp_path / "game.py"
        path.write_text(f"import asyncio, sys, time\n{roles}async def play(ask, task):\n" + body)
        loaded.append(load_environment(path, timeout_s, with_roles=True))
        return loaded[-1]

    yield make
    for environment in loaded:
        environment.close()


class Table:
    """Answers in capitals, some only when another question has been asked."""

    def __init__(self, **waits_for: str) -> None:
        self.waits_for, self.heard = waits_for, [""][:0]
        self.news = asyncio.Condition()

    async def respond(self, role: str, said: Said) -> str:
        assert isinstance(said, str)
        async with self.news:
            self.heard.append(f"{role}: {said}")
            self.news.notify_all()
            if wanted := self.waits_for.get(said):
                await asyncio.wait_for(self.news.wait_for(lambda: wanted in self.heard), 20)
        return said.upper()


def play(environment: Environment, table: Table | None = None) -> GameResult:
    return asyncio.run(environment.play((table or Table()).respond, {"seed": 7}))


def test_turns_follow_each_other(load: Load) -> None:
    table = Table()
    result = play(
        load("""
    said = str(task["seed"])
    for role in ("a", "b", "a"):
        said = await ask(role, said + "x")
    return {"rewards": {"a": 1, "b": -0.5}, "score": len(said), "metrics": {"odd": True, "no": "text"}}
"""),
        table,
    )
    assert table.heard == ["a: 7x", "b: 7Xx", "a: 7XXx"]
    assert (result.rewards, result.score, result.metrics) == ({"a": 1, "b": -0.5}, 4, {"odd": 1})
    assert result.left_out.keys() == {"no"}


def test_questions_of_parallel_branches_are_open_at_the_same_time(load: Load) -> None:
    body = """
    async def branch(role):
        first = await ask(role, f"{role}1")
        await asyncio.sleep(0.01)
        return first + await ask(role, f"{role}2")
    both = await asyncio.gather(branch("a"), branch("b"))
    return {"rewards": {"a": both == ["A1A2", "B1B2"], "b": 0}}
"""
    # each answer is only given when the other branch has asked too
    table = Table(a1="b: b1", b1="a: a1")
    assert play(load(body), table).rewards == {"a": 1, "b": 0}
    assert sorted(table.heard) == ["a: a1", "a: a2", "b: b1", "b: b2"]


def test_a_branch_may_be_given_up(load: Load) -> None:
    body = """
    slow = asyncio.ensure_future(ask("b", "slow"))
    fast = await ask("a", "fast")
    slow.cancel()
    return {"rewards": {"a": fast == "FAST"}}
"""
    assert play(load(body), Table(slow="never")).rewards == {"a": 1}


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("    await ask('c', 'x')\n", r"ValueError: ask\('c', ...\): ROLES has a, b"),
        ("    await ask('a', 7)\n", r"TypeError: ask\('a', an int\); expected a str or a list of messages"),
        ("    1 / 0\n", r"ZeroDivisionError: division by zero \(.*game.py:4\)"),
        ("    sys.exit()\n", "RuntimeError: it called sys.exit"),
        ("    return 1\n", "play returned an int; expected a dict"),
        ("    return {}\n", "play returned rewards=None; expected a dict with the reward of each role"),
        ("    return {'rewards': {'c': 1}}\n", "play returned a reward of 'c'; the roles are a, b"),
        ("    return {'rewards': {'a': None}}\n", r"play returned rewards\['a'\]=None; expected a number"),
        ("    return {'rewards': {'a': 1}, 'winner': 1}\n", "play returned 'winner'; expected rewards"),
        ("    await asyncio.sleep(99)\n", "play took longer than rollout.env_timeout_s=0.5"),
        ("    time.sleep(1.5)\n", "play took longer than rollout.env_timeout_s=0.5"),
        ("    await ask('a', 'x')\n    await asyncio.sleep(99)\n", "play took longer than rollout.env_timeout_s=0.5"),
    ],
)
def test_an_episode_without_a_result_is_unscored(load: Load, body: str, cause: str) -> None:
    environment = load(body, timeout_s=0.5)
    with pytest.raises(Unscored, match=cause):
        play(environment)


def test_the_time_of_the_engine_does_not_count(load: Load) -> None:
    async def slow(role: str, said: Said) -> str:
        await asyncio.sleep(0.6)
        return "late"

    environment = load("    return {'rewards': {'a': await ask('a', 'x') == 'late'}}\n", timeout_s=0.4)
    assert asyncio.run(environment.play(slow, {})).rewards == {"a": 1}


def test_an_error_of_the_engine_is_raised_and_ends_the_script(load: Load, tmp_path: Path) -> None:
    async def broken(role: str, said: Said) -> str:
        raise ConnectionError("the engine is gone")

    body = f"    try:\n        await ask('a', 'x')\n    finally:\n        open({str(tmp_path / 'ended')!r}, 'w')\n"
    environment = load(body)
    with pytest.raises(ConnectionError, match="the engine is gone"):
        asyncio.run(environment.play(broken, {}))
    environment.close()  # it ends what is still at work
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize(
    ("roles", "what"),
    [
        ("", "ROLES must be a list of names"),
        ("ROLES = []\n", "ROLES must be a list of names"),
        ("ROLES = ['a b']\n", "ROLES has 'a b'; a name has letters"),
        ("ROLES = {'a': 1}\n", r"ROLES\['a'\] is an int; expected its system prompt"),
        ("ROLES = ['a']\nasync def step(state, action, extra_info): pass\n", "has play, so it has neither step nor"),
    ],
)
def test_scripts_that_cannot_be_played_are_refused(load: Load, roles: str, what: str) -> None:
    with pytest.raises(ScriptError, match=what):
        load("    return {}\n", roles)


def test_what_cannot_play_roles_says_so(tmp_path: Path) -> None:
    path = tmp_path / "game.py"
    path.write_text(ROLES + "async def play(ask, task): return {}\n")
    with pytest.raises(ScriptError, match=r"several roles, which only runs of reinforcement learning and rl2 play"):
        load_environment(path)


def test_ids_are_kept_from(load: Load) -> None:
    environment = load("    return {}\n", "ROLES = ('x', 'y')\n")
    assert environment.roles == {"x": "", "y": ""}
    described: Any = environment.has_reset
    assert described is False
