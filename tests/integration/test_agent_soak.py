"""A run whose agents fail in every way, some killed at random: failures are unscored, nothing is left, it goes on."""

from __future__ import annotations

import socket
import time
from collections import Counter
from contextlib import suppress
from random import Random

import psutil
import pytest
from programs import Run, make_world, write_rows

pytestmark = pytest.mark.slow

AGENT = """
import http.client, json, os, subprocess, time
from urllib.parse import urlsplit

KEY, URL = os.environ["OPENAI_API_KEY"], urlsplit(os.environ["OPENAI_BASE_URL"])


def ask(task, is_half=False):
    body = json.dumps({"model": "any", "messages": task["messages"], "max_tokens": 8})
    connection = http.client.HTTPConnection(URL.hostname, URL.port)
    connection.putrequest("POST", URL.path + "/chat/completions")
    connection.putheader("Authorization", "Bearer " + KEY)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[: len(body) // 2 if is_half else None].encode())
    return connection


def answer(task):
    return json.load(ask(task).getresponse())["choices"][0]["message"]["content"]


def forked():
    if not os.fork():
        os.setsid()
        if not os.fork():
            time.sleep(7731)
        os._exit(0)


def play(task):
    with open(task["extra_info"]["ports"], "a") as file:
        print(URL.port, file=file)
    kind = task["extra_info"]["kind"]
    if kind == "kills itself":
        ask(task)
        os.kill(os.getpid(), 9)
    if kind == "hangs":
        ask(task).getresponse()
        time.sleep(7731)
    if kind == "stops halfway":
        ask(task, is_half=True)
        time.sleep(7731)
    if kind == "exits":
        answer(task)
        os._exit(3)
    if kind == "leaves no reward":
        return None if answer(task) else None
    if kind == "hangs up":
        for is_half in (True, False):
            ask(task, is_half).close()
    if kind == "leaves children":
        subprocess.Popen(["sleep", "7731"], start_new_session=True)
        forked()
    return float(any(character.isdigit() for character in answer(task)))
"""

CAUSES = {
    "plays": None,
    "hangs up": None,
    "leaves children": None,
    "kills itself": "killed by signal 9",
    "exits": "exit status 3",
    "leaves no reward": "the agent left no reward",
    "hangs": "rollout.agent_timeout_s=8",
    "stops halfway": "rollout.agent_timeout_s=8",
}
ANY = ("killed by signal 9", "rollout.agent_timeout_s=8")
"""Causes that any agent may have: this test kills some, and a busy machine makes others late."""


def is_of(kind: str, cause: str | None) -> bool:
    expected = CAUSES[kind]
    return cause == expected or (expected is not None and expected in (cause or ""))


def agents_of(run: Run) -> list[psutil.Process]:
    """The agents of this run alone, with what they have started: other runs on this machine have agents, too."""
    with suppress(psutil.NoSuchProcess):
        hosts = psutil.Process(run.process.pid).children()
        return [process for host in hosts if is_host(host) for process in host.children(recursive=True)]
    return []


def is_host(process: psutil.Process) -> bool:
    return any(word.endswith("agents/host.py") for word in process.cmdline())


def test_agents_that_fail_at_random_leave_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    world = make_world(tmp_path_factory.mktemp("soak"))
    (world.root / "agent.py").write_text(AGENT)
    ports, random = world.root / "ports.txt", Random(0)
    asked = [{"role": "user", "content": "Say 1"}]
    kinds = [*CAUSES, *["plays"] * len(CAUSES)]  # or a step could have no reward at all
    rows = [{"messages": asked, "extra_info": {"kind": kind, "ports": str(ports)}} for kind in kinds]
    write_rows(world.root / "chats.jsonl", rows)
    run = world.start(
        "ppo",
        f"train_data.path={world.root}/chats.jsonl",
        "rollout.env_path=null",
        f"rollout.agent={world.root}/agent.py:play",
        "train_data.prompts_per_rollout=8",
        "train_data.responses_per_prompt=2",
        "rollout.max_turns=4",
        "rollout.max_running_agents=8",
        "rollout.agent_timeout_s=8",
        "trainer.max_steps=8",
        "trainer.samples_per_step=16",
        "trainer.n_epochs=4",
    )
    num_kills, seen = 0, set[psutil.Process]()
    while run.process.poll() is None:
        time.sleep(4)
        if running := agents_of(run):
            seen.update(running)
            with suppress(psutil.NoSuchProcess):
                random.choice(running).kill()
                num_kills += 1
    run.wait().succeeded()

    assert len(run.metrics) == 8 and num_kills >= 4
    assert len(run.samples) == 8 * 16
    causes = Counter((kinds[sample["row"]], sample["unscored"]) for sample in run.samples)
    others = [(kind, cause) for kind, cause in causes if not is_of(kind, cause)]
    assert not [each for each in others if not any(cause in (each[1] or "") for cause in ANY)]
    assert {kind for kind, cause in causes if is_of(kind, cause)} == set(CAUSES)
    assert all(row["train/unscored"] < 16 for row in run.metrics)
    assert not [process for process in seen if process.is_running()]
    for port in set(ports.read_text().split()):
        with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(port)), 5):
            pass
