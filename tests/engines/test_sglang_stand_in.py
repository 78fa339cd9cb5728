"""What only served engines do, with SGLang's routes: servers that die or sleep, or run already behind a router."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from served import (
    MAX_LENGTH,
    PROMPT,
    ROOT,
    STAND_IN,
    Served,
    assert_agree,
    logits_of,
    logps_of,
    pool,
    save_model,
    serve,
    two_servers,
)
from transformers import PreTrainedTokenizerBase

from RL2.engines.sglang.client import SGLangClient
from RL2.engines.sglang.server_spec import SGLANG_SERVER
from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling

LONG = Sampling(max_new_tokens=300)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Iterator[Served]:
    yield from two_servers("sglang", tmp_path_factory.mktemp("served"), tokenizer, processes)


def process_id(served: Served, i: int) -> int:
    process = pool(served).servers[i].process
    assert process is not None
    return process.pid


def wait_for(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited for {limit_s} s"
        time.sleep(0.05)


def has_restarted(served: Served, restarts: int) -> bool:
    if pool(served).restarts <= restarts:
        return False
    with pool(served).lock:  # it has the newest weights, and was compared
        return True


def test_a_server_that_dies_starts_again_and_its_requests_are_made_anew(served: Served) -> None:
    prompts, restarts = [[5 + i, *PROMPT] for i in range(16)], pool(served).restarts
    expected = served.generate(prompts, LONG)
    served.engine.metrics()

    async def generate() -> list[Completion]:
        loop = asyncio.get_running_loop()
        loop.call_later(0.2, os.kill, process_id(served, 0), signal.SIGKILL)
        requests = (
            served.engine.generate(prompt, Sampling(max_new_tokens=300, seed=100 + i))
            for i, prompt in enumerate(prompts)
        )
        return await asyncio.gather(*requests)

    assert_agree(asyncio.run(generate()), expected)
    assert served.engine.metrics()["engine/retried"] > 0
    wait_for(lambda: has_restarted(served, restarts))
    lm = served.reference()
    for client in pool(served).clients:
        ours = torch.tensor(client.logps(PROMPT))
        torch.testing.assert_close(ours, logps_of(lm, PROMPT[:1], PROMPT[1:], LONG), rtol=0, atol=1e-4)


def test_a_server_that_sleeps_is_healthy_has_no_weights_and_gets_them_again(served: Served) -> None:
    before = served.generate([PROMPT], Sampling(max_new_tokens=8))
    served.engine.sleep()
    client = pool(served).clients[0]
    assert httpx.get(f"{client.url}/health", trust_env=False).status_code == 503
    assert client.is_healthy(5)
    served.engine.sleep()  # there is nothing more to release
    served.sync()
    assert client.is_healthy(5)
    assert [c.token_ids for c in served.generate([PROMPT], Sampling(max_new_tokens=8))] == [before[0].token_ids]


def test_a_server_that_dies_in_its_sleep_gets_the_next_weights(served: Served) -> None:
    restarts = pool(served).restarts
    served.engine.sleep()
    os.kill(process_id(served, 1), signal.SIGKILL)
    wait_for(lambda: has_restarted(served, restarts))
    served.change_weights(seed=5)
    served.sync()
    assert served.generate([PROMPT] * 4, Sampling(max_new_tokens=4))[3].versions == [served.version] * 4


def test_a_server_that_dies_while_it_starts_again_is_started_once_more(served: Served) -> None:
    before, first = pool(served).restarts, process_id(served, 0)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: process_id(served, 0) != first)
    os.kill(process_id(served, 0), signal.SIGKILL)  # it takes seconds to come up
    wait_for(lambda: pool(served).restarts == before + 2)
    served.sync()
    assert served.generate([PROMPT], LONG)[0].versions[0] == served.version
    with pool(served).lock:
        assert pool(served).clients[0].is_healthy(5)


def test_the_most_likely_tokens_have_log_probabilities_of_their_own(served: Served) -> None:
    """Without top_p: beside top_k SGLang takes it of the whole distribution, which the stand-in's sampler does not."""
    sampling = Sampling(max_new_tokens=24, temperature=0.8, top_k=8, seed=100)
    (completion,) = served.generate([PROMPT], sampling)
    logits_NV = logits_of(served.reference(), PROMPT, completion.token_ids) / 0.8
    kept_NV = logits_NV.masked_fill(logits_NV < logits_NV.topk(8).values[:, -1:], -torch.inf)
    expected_N = kept_NV.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logps), expected_N, rtol=0, atol=1e-4)


def test_a_response_goes_on_over_an_end_token_of_the_model_as_if_it_were_none(served: Served) -> None:
    """SGLang ends there all the same, if other end tokens are asked for."""
    end, never = served.tokenizer.eos_token_id, 3
    prompts = [[5 + i, *PROMPT] for i in range(64)]
    free = served.generate(prompts, Sampling(max_new_tokens=100))
    asked = served.generate(prompts, Sampling(max_new_tokens=100, stop_token_ids=(never,)))
    lengths = [c.token_ids.index(never) + 1 if never in c.token_ids else 100 for c in free]
    cut = [replace(c, token_ids=c.token_ids[:n], logps=c.logps[:n]) for c, n in zip(free, lengths, strict=True)]
    assert_agree(asked, cut)
    for ours, theirs in zip(asked, cut, strict=True):
        if ours.token_ids == theirs.token_ids:
            assert ours.logps == pytest.approx(theirs.logps, abs=1e-4)
    assert any(end in completion.token_ids[:-1] for completion in asked)


def test_the_token_is_wanted_and_not_to_be_seen(served: Served) -> None:
    url, token = pool(served).clients[0].url, pool(served).addresses.token
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for path in ("/generate", "/pause_generation", "/update_weights_from_disk"):
            assert httpx.post(url + path, json={}, headers=headers, trust_env=False).status_code == 401
    assert token not in Path(f"/proc/{process_id(served, 0)}/cmdline").read_text()


def test_nothing_is_left_after_close(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes) -> None:
    model = save_model(tmp_path / "model", tokenizer, tied=True)
    served = serve("sglang", model, tmp_path, tokenizer, processes)
    served.sync()
    pid, folder, temporary = process_id(served, 0), pool(served).sync.folder, pool(served).temporary.path
    assert list(folder.rglob("*.safetensors"))
    served.engine.close()
    assert not Path(f"/proc/{pid}").exists() and not folder.exists() and not temporary.exists()


class Router(ThreadingHTTPServer):
    """Hands on what it is asked to `worker`."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self, worker: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.worker = worker
        self.paths: set[str] = set()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()


class _Forward(BaseHTTPRequestHandler):
    server: Router

    def do_POST(self) -> None:
        self.server.paths.add(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {"Authorization": self.headers["Authorization"], "Content-Type": "application/json"}
        answer = httpx.post(self.server.worker + self.path, content=body, headers=headers, timeout=60, trust_env=False)
        self.send_response(answer.status_code)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_servers_behind_a_router_are_attached_to_and_outlive_the_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router gets the requests for samples and nothing else, the server the weights."""
    model = save_model(tmp_path / "model", tokenizer, tied=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", f"{STAND_IN}:{ROOT}")
    command = [sys.executable, str(SGLANG_SERVER.launcher), *BY_HAND, "--model-path", str(model), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url, sync = f"http://127.0.0.1:{port}", tmp_path / "sync"
    try:
        client = SGLangClient(url, "secret")
        wait_for(lambda: server.poll() is not None or client.is_healthy(5))
        assert server.poll() is None, (tmp_path / "log").read_text()
        router = Router(url)
        here = f"http://127.0.0.1:{router.server_address[1]}"
        where = [f"rollout.sglang.urls=[{url}]", f"rollout.sglang.router_url={here}", f"rollout.sglang.sync_dir={sync}"]
        served = serve("sglang", model, tmp_path, tokenizer, processes, *where)
        served.sync()
        (completion,) = served.generate([PROMPT], Sampling(max_new_tokens=8))
        assert completion.versions == [1] * 8
        assert router.paths == {"/generate"}
        served.engine.close()
        assert not list(sync.iterdir()) and client.is_healthy(5)
        router.shutdown()
        router.server_close()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


BY_HAND = [
    *("--host", "127.0.0.1", "--dtype", "float32", "--device", "cpu", "--context-length", str(MAX_LENGTH + 8)),
    *("--max-running-requests", "64", "--mem-fraction-static", "0.5", "--sampling-mask-max-tokens", "4096"),
    *("--enable-deterministic-inference", "--enable-metrics"),
]
