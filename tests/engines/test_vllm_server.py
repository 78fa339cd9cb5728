"""What only served engines do: servers that die, or run already; doors that are shut."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from served import (
    PROMPT,
    Served,
    assert_agree,
    logps_of,
    pool,
    process_ids,
    save_model,
    serve,
    started_by_hand,
    two_servers,
    wait_for,
)
from transformers import PreTrainedTokenizerBase

from RL2.engines.served.server import EngineFailed
from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling

pytestmark = pytest.mark.vllm
LONG = Sampling(max_new_tokens=400, seed=3)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Iterator[Served]:
    yield from two_servers("vllm", tmp_path_factory.mktemp("served"), tokenizer, processes)


@pytest.mark.parametrize("victim", [0, 1], ids=["api_server", "engine_core"])
def test_a_server_that_dies_starts_again_and_its_requests_are_made_anew(served: Served, victim: int) -> None:
    served.change_weights(seed=2)
    served.sync()
    prompts = [[5 + i, *PROMPT] for i in range(16)]
    expected = served.generate(prompts, LONG)
    restarts = served.engine.metrics()["engine/restarts"]
    killed = process_ids(served, 0)

    async def generate() -> list[Completion]:
        async def kill() -> None:
            await asyncio.sleep(0.7)
            os.kill(killed[victim], signal.SIGKILL)

        loop_request = [served.engine.generate(p, _seeded(i)) for i, p in enumerate(prompts)]
        *completions, _ = await asyncio.gather(*loop_request, kill())
        return completions  # type: ignore[return-value]

    completions = asyncio.run(generate())
    assert_agree(completions, expected)
    assert {v for c in completions for v in c.versions} == {served.version}

    wait_for(lambda: pool(served).servers[0].is_running and pool(served).clients[0].is_healthy(5))
    with pool(served).lock:  # it has the newest weights, and was compared
        assert served.engine.metrics()["engine/restarts"] == restarts + 1
    assert not [pid for pid in killed if psutil.pid_exists(pid)]
    lm = served.reference()
    for client in pool(served).clients:
        torch.testing.assert_close(
            torch.tensor(client.logps(PROMPT)), logps_of(lm, PROMPT[:1], PROMPT[1:], LONG), rtol=0, atol=1e-4
        )


def _seeded(i: int) -> Sampling:
    return Sampling(max_new_tokens=LONG.max_new_tokens, seed=100 + i)


def test_only_who_has_the_token_gets_in(served: Served) -> None:
    client = pool(served).clients[1]
    for method, path in (
        ("POST", "/inference/v1/generate"),
        ("POST", "/pause"),
        ("POST", "/collective_rpc"),
        ("GET", "/metrics"),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = httpx.request(method, client.url + path, json={}, headers=headers, trust_env=False)
            assert answer.status_code == 401
    assert client.is_healthy(5)


def test_a_file_from_elsewhere_is_not_read(served: Served) -> None:
    client = pool(served).clients[1]
    with pytest.raises(Exception, match="is not a file in"):
        client.load_weights([f"../../../{served.model}/model.safetensors"], "99")
    served.sync()  # and it goes on
    assert served.generate([PROMPT], Sampling(max_new_tokens=2))[0].versions == [served.version] * 2


def test_a_server_that_was_started_by_hand_is_attached_to(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/engines.md says; weights go through files, and the server outlives the run."""
    model, sync = save_model(tmp_path / "model", tokenizer, tied=True), tmp_path / "sync"
    with started_by_hand(model, tmp_path, monkeypatch) as client:
        served = serve(
            "vllm",
            model,
            tmp_path,
            tokenizer,
            processes,
            f"rollout.vllm.urls=[{client.url}]",
            f"rollout.vllm.sync_dir={sync}",
        )
        served.sync()
        assert len(list(sync.rglob("*.safetensors"))) == 1
        (completion,) = served.generate([PROMPT], Sampling(max_new_tokens=8))
        assert completion.versions == [1] * 8
        served.engine.close()
        assert not list(sync.iterdir()) and client.is_healthy(5)


def test_nothing_is_left_after_close(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> None:
    """And a server that dies once too often ends the run with its last words."""
    model = save_model(tmp_path / "model", tokenizer, tied=True)
    served = serve("vllm", model, tmp_path, tokenizer, processes, "rollout.vllm.max_restarts=0")
    served.sync()
    weights, temporary, ids = pool(served).sync.folder, pool(served).temporary.path, process_ids(served, 0)
    assert list(temporary.glob("0/*")) and list(weights.rglob("*.safetensors"))

    async def generate() -> None:
        request = asyncio.create_task(served.engine.generate(PROMPT, LONG))
        await asyncio.sleep(0.3)
        os.kill(ids[1], signal.SIGKILL)
        await request

    with pytest.raises(EngineFailed, match=r"after 0 restarts \(rollout.vllm.max_restarts\); the end of .*log"):
        asyncio.run(generate())
    served.engine.close()
    served.engine.close()
    wait_for(lambda: not [pid for pid in ids if psutil.pid_exists(pid)])
    assert not weights.exists() and not temporary.exists()
