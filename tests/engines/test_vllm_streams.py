"""Weights that reach vLLM servers from memory to memory: by broadcast, on CPUs by gloo. CUDA IPC is in tests/gpu."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from served import (
    PROMPT,
    Served,
    logps_of,
    pool,
    process_ids,
    save_model,
    serve,
    started_by_hand,
    two_servers,
    wait_for,
)
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from RL2.engines.served import weight_stream as streams
from RL2.engines.served.client import ServerError
from RL2.engines.served.engine import ServedEngine
from RL2.engines.served.server import EngineFailed
from RL2.engines.served.weight_sync import Stage
from RL2.engines.vllm.client import VLLMClient
from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling

pytestmark = pytest.mark.vllm
SMALL = 10_000
"""Bytes of a bucket: norms share one, and the embeddings, of more than that, are one each."""
SAMPLING = Sampling(max_new_tokens=1)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Iterator[Served]:
    yield from two_servers("vllm-broadcast", tmp_path_factory.mktemp("served"), tokenizer, processes)


@pytest.fixture
def served(pair: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(pool(pair).sync, "bucket_bytes", SMALL)
    return pair


def check(served: Served) -> None:
    """All servers have the trainer's weights."""
    expected = logps_of(served.reference(), PROMPT[:1], PROMPT[1:], SAMPLING)
    for client in pool(served).clients:
        torch.testing.assert_close(torch.tensor(client.logps(PROMPT)), expected, rtol=0, atol=1e-4)


def refused(served: Served) -> dict[int, str]:
    """Why servers did not take the last weights from memory."""
    return {i: state.problem for i, state in enumerate(pool(served).sync.states) if state.problem}


def stream(served: Served, seed: int) -> None:
    """New weights, which all servers take from memory."""
    served.change_weights(seed)
    served.sync()
    assert refused(served) == {}
    check(served)


def test_weights_arrive_in_many_buckets(served: Served) -> None:
    sizes = {name: weight.nbytes for name, weight in served.actor.weights()}
    assert max(sizes.values()) > SMALL > 4 * min(sizes.values())
    for seed in (1, 2):
        stream(served, seed)
        completions = served.generate([PROMPT, PROMPT[1:]], Sampling(max_new_tokens=2))
        assert {v for c in completions for v in c.versions} == {served.version}
    assert len(list(pool(served).sync.folder.rglob("*.safetensors"))) > 10  # for a server that starts again


@pytest.mark.parametrize("victim", [0, 1], ids=["api_server", "engine_core"])
def test_a_server_that_dies_in_mid_stream_takes_the_files(served: Served, victim: int) -> None:
    served.change_weights(seed=3)
    restarts = served.engine.metrics()["engine/restarts"]

    def weights() -> Iterator[tuple[str, Tensor]]:
        for i, weight in enumerate(served.actor.weights()):
            if i == 6:
                os.kill(process_ids(served, 1)[victim], signal.SIGKILL)
            yield weight

    begun = time.monotonic()
    served.version += 1
    served.engine.load_weights(weights(), served.version)
    assert time.monotonic() - begun < 60
    assert refused(served).keys() == {0, 1}  # the group has broken, and the other one took the files too
    assert served.engine.metrics()["engine/restarts"] == restarts + 1
    check(served)
    completions = served.generate([[5 + i, *PROMPT] for i in range(8)], Sampling(max_new_tokens=2))
    assert {v for c in completions for v in c.versions} == {served.version}
    stream(served, seed=4)


def test_a_server_that_hangs_in_mid_stream_is_not_waited_for_without_end(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEALTH_TIMEOUT_S", 2)
    served.change_weights(seed=11)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for i, weight in enumerate(served.actor.weights()):
            if i == 6:
                for process_id in process_ids(served, 0):
                    os.kill(process_id, signal.SIGSTOP)
            yield weight

    begun = time.monotonic()
    served.version += 1
    served.engine.load_weights(weights(), served.version)
    assert time.monotonic() - begun < 90
    check(served)
    stream(served, seed=12)


def test_a_server_that_dies_between_stream_and_probe_takes_the_files(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    restarts = served.engine.metrics()["engine/restarts"]

    def kill_and_wait(token_ids: list[int]) -> list[float]:
        os.kill(process_ids(served, 0)[0], signal.SIGKILL)
        wait_for(lambda: served.engine.metrics()["engine/restarts"] > restarts)
        with pool(served).lock:
            stages = [state.stage for state in pool(served).sync.states]
            assert stages == [Stage.CURRENT, Stage.STREAMED]
        return served.actor.logps(token_ids)

    served.change_weights(seed=5)
    with monkeypatch.context() as patch:
        assert isinstance(served.engine, ServedEngine)
        patch.setattr(served.engine, "check", replace(served.engine.check, trainer_logps=kill_and_wait))
        served.sync()
    assert refused(served) == {}
    check(served)
    stream(served, seed=6)


def test_a_bucket_that_one_server_refuses_comes_in_files_without_a_wait(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, calls = pool(served).clients[1], 0
    assert isinstance(client, VLLMClient)
    update = client.update

    def another(info: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        entries = [{**each, "dtype": "float33"} for each in info["entries"]] if calls == 4 else info["entries"]
        update({"entries": entries})

    restarts, begun = served.engine.metrics()["engine/restarts"], time.monotonic()
    served.change_weights(seed=7)
    with monkeypatch.context() as patch:
        patch.setattr(client, "update", another)
        served.sync()
    assert time.monotonic() - begun < 20
    assert "float33 is not a torch dtype" in refused(served)[1] and 0 in refused(served)
    assert served.engine.metrics()["engine/restarts"] == restarts
    check(served)
    stream(served, seed=8)


@pytest.mark.parametrize(
    ("info", "said"),
    [
        ({"entries": [{"name": "x", "dtype": "Tensor", "shape": [4]}]}, "Tensor is not a torch dtype"),
        ({"entries": [{"name": "x", "dtype": "float32", "shape": [-4]}]}, r"\[-4\] is not a shape"),
        ({"bytes": 3}, "Invalid update_info"),
        ({}, "without files and entries"),
    ],
)
def test_what_is_no_update_is_refused_and_the_server_goes_on(served: Served, info: dict[str, Any], said: str) -> None:
    client = pool(served).clients[1]
    assert isinstance(client, VLLMClient)
    client.start_update()
    with pytest.raises((ServerError, ValueError), match=said):
        client.update(info)
    served.sync()  # in files: it has left the group
    check(served)
    stream(served, seed=9)


def test_what_a_trainer_that_is_gone_has_left_open_is_closed(served: Served) -> None:
    client = pool(served).clients[0]
    assert isinstance(client, VLLMClient)
    client.start_update()
    served.sync()
    check(served)


@pytest.mark.parametrize("transport", ["broadcast", "files"])
def test_servers_that_sleep_wake_with_the_next_weights(
    served: Served, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that a server on a GPU gets; on a CPU it keeps its memory, and does all the rest."""
    for client in pool(served).clients:
        monkeypatch.setattr(client, "can_sleep", True)
    if transport == "files":
        monkeypatch.setattr(pool(served).sync, "stream", None)
    lms = {served.version: served.reference()}
    sampling = Sampling(max_new_tokens=200)

    async def generate() -> list[Completion]:
        prompts = [[5 + i, *PROMPT] for i in range(12)]
        requests = [asyncio.create_task(served.engine.generate(p, replace(sampling, seed=9))) for p in prompts]
        await served.engine.generate(PROMPT, Sampling(max_new_tokens=8))
        await asyncio.to_thread(served.engine.sleep)
        await asyncio.to_thread(served.engine.sleep)  # again is the same
        assert all(client.call("/is_sleeping")["is_sleeping"] for client in pool(served).clients)
        served.change_weights(seed=10)
        await asyncio.to_thread(served.sync)
        assert not any(client.call("/is_sleeping")["is_sleeping"] for client in pool(served).clients)
        lms[served.version] = served.reference()
        return await asyncio.gather(*requests)

    completions = asyncio.run(generate())
    assert refused(served) == {}
    assert {v for c in completions for v in c.versions} == set(lms)
    for i, completion in enumerate(completions):
        versions_N = torch.tensor(completion.versions)
        for version, lm in lms.items():
            is_its_N = versions_N == version
            expected_N = logps_of(lm, [5 + i, *PROMPT], completion.token_ids, sampling)
            torch.testing.assert_close(
                torch.tensor(completion.logps)[is_its_N], expected_N[is_its_N], rtol=0, atol=1e-4
            )
    served.sync()  # without a sleep before
    check(served)


def test_servers_that_were_started_by_hand_share_no_folder_with_the_trainer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that refuses ends the run, and works in the next one."""
    model = save_model(tmp_path / "model", tokenizer, tied=True)
    with started_by_hand(model, tmp_path, monkeypatch) as client:
        where = (f"rollout.vllm.urls=[{client.url}]", f"rollout.vllm.sync_dir={tmp_path / 'sync'}")
        served = serve("vllm-broadcast", model, tmp_path, tokenizer, processes, *where)
        for seed in (1, 2):
            stream(served, seed)
        (completion,) = served.generate([PROMPT], Sampling(max_new_tokens=8))
        assert completion.versions == [2] * 8
        drawn = [name for name, _ in served.actor.weights()]

        def wrong() -> Iterator[tuple[str, Tensor]]:
            for name, weight in served.actor.weights():
                drawn.remove(name)
                yield f"not.{name}", weight

        with pytest.raises(
            EngineFailed, match=f"weights for the vLLM server at {client.url}: /update_weights: HTTP 500"
        ):
            served.engine.load_weights(wrong(), 3)
        assert drawn == []  # all of it was, as other processes do too
        served.engine.close()

        again = serve("vllm-broadcast", model, tmp_path, tokenizer, processes, *where)
        again.sync()
        check(again)
        assert not list((tmp_path / "sync").rglob("*.safetensors"))
        again.engine.close()


def test_without_restarts_nothing_is_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> None:
    model = save_model(tmp_path / "model", tokenizer, tied=True)
    served = serve("vllm-broadcast", model, tmp_path, tokenizer, processes, "rollout.vllm.max_restarts=0")
    stream(served, seed=1)
    assert not list(pool(served).sync.folder.rglob("*.safetensors"))
    os.kill(process_ids(served, 0)[1], signal.SIGKILL)
    with pytest.raises(EngineFailed, match=r"weights for the vLLM server at|after 0 restarts"):
        served.sync()
    served.engine.close()


def test_each_worker_of_a_server_takes_its_part(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", tokenizer, tied=False)
    parallel = (
        "rollout.vllm.args=[--tensor-parallel-size,'2',--distributed-executor-backend,mp]",
        "rollout.vllm.env.VLLM_CPU_OMP_THREADS_BIND=nobind",
    )
    before = set(Path("/dev/shm").iterdir())
    served = serve("vllm-broadcast", model, tmp_path, tokenizer, processes, *parallel)
    monkeypatch.setattr(pool(served).sync, "bucket_bytes", SMALL)
    for seed in (1, 2):
        stream(served, seed)
    client = pool(served).clients[0]
    assert isinstance(client, VLLMClient) and client.num_workers() == 2
    served.engine.close()
    for left in set(Path("/dev/shm").iterdir()) - before:  # vLLM's executor of several workers does not tidy up
        if left.name.startswith(("psm_", "vllm_dist_")):
            left.unlink()
