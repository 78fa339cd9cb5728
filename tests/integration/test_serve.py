"""`rl2 serve`: any client, the same response to the same seed, and an end on Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from programs import World, make_world

pytestmark = pytest.mark.slow
RL2 = str(Path(sys.executable).with_name("rl2"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(world: World) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its address and its key."""
    command = [RL2, "serve", str(world.model), "--port", "0", "--max-new-tokens", "16"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    address, key = re.findall(r"ANTHROPIC_BASE_URL=(\S+) ANTHROPIC_API_KEY=(\S+)", lines[2])[0]
    yield process, address, key
    process.kill()
    process.wait()


def test_a_model_answers_until_it_is_interrupted(served: tuple[subprocess.Popen[str], str, str], world: World) -> None:
    process, address, key = served
    with httpx.Client(base_url=address, headers={"x-api-key": key}, timeout=120) as client:
        ask = {"model": "any", "messages": [{"role": "user", "content": "12+30?"}]}

        def said(**more: object) -> str:
            answer = client.post("/v1/chat/completions", json=ask | more)
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        assert said(seed=1) == said(seed=1) != said(seed=2)
        assert said() != said()
        assert said(temperature=0) == said(temperature=0, seed=3)
        assert client.post("/v1/chat/completions", json=ask, headers={"x-api-key": "no"}).status_code == 401
    port = address.rpartition(":")[2]
    other = subprocess.run(
        [RL2, "serve", str(world.model), "--port", port], capture_output=True, text=True, timeout=600
    )
    assert other.returncode == 1 and other.stderr.splitlines()[-1] == (
        f"rl2 serve: --port {port} cannot be opened: Address already in use; 0 picks a free one"
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health", timeout=5)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = subprocess.run([RL2, "serve", str(tmp_path / "none")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"rl2 serve: model={tmp_path}/none")
