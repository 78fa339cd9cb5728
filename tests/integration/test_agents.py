"""Runs whose episodes are played by an agent, a program that knows only the address of an API and a key."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from programs import World, make_world, write_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

AGENT = """
import openai
client = openai.OpenAI()  # with the episode's address and key, from the environment

def play(task):
    messages, digits = list(task["messages"]), 0
    for turn in range(2):
        answer = client.chat.completions.create(model="any", messages=messages, max_tokens=8).choices[0].message
        digits += sum(character.isdigit() for character in answer.content)
        messages += [answer, {"role": "user", "content": "Sure?"}]
    return {"reward": float(digits > 0), "metrics": {"digits": digits}}
"""

FAILING = """import os, time
    (lambda: os._exit(3), lambda: os.kill(os.getpid(), 9), lambda: time.sleep(99), lambda: None)[task["row"] % 4]()
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("agents"))


def played_by(world: World, source: str, *, name: str = "agent") -> list[str]:
    (world.root / f"{name}.py").write_text(source)
    rows = [{"messages": [{"role": "user", "content": f"Say {n}"}], "extra_info": {"answer": n}} for n in range(8)]
    write_rows(world.root / "chats.jsonl", rows)
    return [
        f"train_data.path={world.root}/chats.jsonl",
        "rollout.env_path=null",
        f"rollout.agent={world.root}/{name}.py:play",
        "rollout.max_turns=4",
        "rollout.max_running_agents=4",
        "actor.max_length_per_device=512",
    ]


@pytest.mark.parametrize("program", ["spo", "ppo"])
def test_an_agent_trains(world: World, program: str) -> None:
    run = world.run(program, *played_by(world, AGENT)).succeeded()
    assert len(run.metrics) == 3
    for row in run.metrics:
        assert row["train/unscored"] == 0 and row["train/turns"] == 2
        assert row["actor/logp_gap_max"] < 1e-4


def test_two_processes_play_the_same_episodes_as_one(world: World) -> None:
    settings = played_by(world, AGENT)
    one, two = (world.run("ppo", *settings, nproc=number).succeeded() for number in (1, 2))
    for name in ("train/reward", "train/env/digits"):
        assert [row[name] for row in one.metrics] == [row[name] for row in two.metrics]


def test_an_agent_makes_its_tasks_of_the_seed(world: World) -> None:
    (world.root / "seeded.py").write_text(AGENT.replace('list(task["messages"])', 'list(task["messages"] or START)'))
    with (world.root / "seeded.py").open("a") as file:
        file.write('START = [{"role": "user", "content": "Say a digit."}]\n')
        file.write("played = play\n")
        file.write('def play(task): return played(task) | {"metrics": {"task": task["seed"] % 1000}}\n')
    run = world.run(
        "ppo",
        *played_by(world, AGENT),
        f"rollout.agent={world.root}/seeded.py:play",
        "train_data.path=null",
        "train_data.responses_per_prompt=2",
        "test_data.prompts_per_rollout=2",
        "trainer.test_freq=2",
        "trainer.max_steps=2",
    ).succeeded()
    assert [row["train/unscored"] for row in run.metrics if "actor/loss" in row] == [0, 0]
    tested = [row["test/env/task"] for row in run.metrics if "test/env/task" in row]
    assert len(tested) == 2 and len(set(tested)) == 1, "tests have the same tasks each time"
    trained = [row["train/env/task"] for row in run.metrics if "train/env/task" in row]
    assert len(set(trained)) == 2, "steps have tasks of their own"


def test_an_environment_of_verifiers_trains(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns, a system message, and two rewards, of which the tiny model earns one."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/tests/tasksets")
    monkeypatch.setenv("VERIFIERS_TASKSET", "guessing")
    run = world.run(
        "spo",
        *played_by(world, AGENT),
        f"rollout.agent={ROOT}/envs/agents/verifiers_agent.py:play",
        "rollout.max_turns=2",
        "reward.weights.form=2",
        "train_data.path=null",
        "train_data.prompts_per_rollout=2",
        "train_data.responses_per_prompt=4",
        "trainer.max_steps=2",
    ).succeeded()
    assert len(run.metrics) == 2
    for row in run.metrics:
        assert row["train/unscored"] == 0 and 1 <= row["train/env/guesses"] == row["train/turns"] <= 2
        assert 0 < row["train/reward/form"] <= 0.5
        assert row["train/reward"] == pytest.approx(row["train/reward/found"] + 2 * row["train/reward/form"])
        assert row["actor/logp_gap_max"] < 1e-4
    twice = [texts for sample in run.samples if len(texts := sample["texts"]) == 4]
    assert twice and all(third.startswith(first + second) for first, second, third, _ in twice)


def test_agents_that_fail_are_unscored_and_the_run_goes_on(world: World) -> None:
    source = AGENT.replace("    messages, digits", f"    {FAILING}\n    messages, digits")
    limits = ("rollout.agent_timeout_s=15", "trainer.max_steps=2", "trainer.samples_per_step=16")
    run = world.run("ppo", *played_by(world, source, name="failing"), *limits).succeeded()
    rows, samples = run.metrics, run.samples
    assert len(rows) == 2 and all(row["train/unscored"] > 0 for row in rows)
    causes = {sample["row"] % 4: sample["unscored"] for sample in samples}
    expected = {0: "exit status 3", 1: "signal 9", 2: "rollout.agent_timeout_s=15"}
    assert len(causes) == 4 and causes.pop(3) is None
    assert all(expected[kind] in cause for kind, cause in causes.items())
    of_the_run = f"{world.root}/failing.py"  # a word of the command line of what starts agents, and of the agents
    assert not [p for p in psutil.process_iter(["cmdline"]) if of_the_run in (p.info["cmdline"] or [])]


@pytest.mark.parametrize(
    "ahead",
    [("rollout.max_staleness=1",), ("rollout.max_staleness=2", "rollout.partial_rollout=0.5")],
    ids=["asynchronous", "partial"],
)
def test_agents_play_ahead_of_training(world: World, ahead: tuple[str, ...]) -> None:
    rows = world.run("ppo", *played_by(world, AGENT), *ahead).succeeded().metrics
    assert len(rows) == 3 and all(row["train/unscored"] == 0 and row["actor/logp_gap_max"] < 0.5 for row in rows)
