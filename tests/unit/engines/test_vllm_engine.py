"""The client's side of served engines: what it makes of answers, failures and silence. A small HTTP server answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from RL2.config.here import check_here
from RL2.config.load import load
from RL2.config.rollout import VLLM
from RL2.engines.served import engine as engine_module
from RL2.engines.served.buckets import write
from RL2.engines.served.engine import ServedEngine, make_probe
from RL2.engines.served.owned_dirs import OwnedDir
from RL2.engines.served.router import Router
from RL2.engines.served.server import EngineFailed, Server, free_port
from RL2.engines.served.server_spec import EngineSpec
from RL2.engines.served.weight_sync import WeightCheck
from RL2.engines.served.wire.rl2_wire import adapter_tensors
from RL2.engines.vllm.server_spec import VLLM_SERVER
from RL2.errors import ConfigError
from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling

SETTINGS = VLLM(
    urls=(),
    num_servers=1,
    python="none",
    args=(),
    env={},
    transport="files",
    kv_cache_mib=None,
    sync_dir=None,
    bucket_mib=1,
    max_probe_gap=None,
    start_timeout_s=1,
    request_timeout_s=1,
    max_restarts=0,
)
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


class StandIn(ThreadingHTTPServer):
    """Speaks vLLM's routes. Token i of an answer is seed + i, its log-probability -0.5; `faults` come first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[str] = []
        self.has_tokens_route = True
        self.version = "default"
        self.folder, self.files, self.loaded = "", [""], dict[str, torch.Tensor]()
        self.prompts: list[list[int]] = []
        self.now = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        if self.path == "/weight_info":
            return self.answer(200, json.dumps({"weight_version": self.server.version}))
        text = (
            'vllm:request_queue_time_seconds_sum{engine="0"} 3.0\nvllm:request_queue_time_seconds_count{engine="0"} 6'
        )
        self.answer(200, text)

    def do_POST(self) -> None:
        body, stand_in = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        match self.path:
            case "/init_weight_transfer_engine":
                stand_in.folder = body["init_info"]["folder"]
            case "/update_weights":
                stand_in.files = body["update_info"]["files"]
            case "/finish_weight_update":
                stand_in.version = body["weight_version"]
                each = [load_file(f"{stand_in.folder}/{file}") for file in stand_in.files]
                stand_in.loaded = {name: weight for file in each for name, weight in file.items()}
            case "/inference/v1/generate" if not stand_in.has_tokens_route:
                return self.answer(403, "Scale-out endpoints are disabled")
            case "/v1/completions":
                return self.complete(body)
            case "/inference/v1/generate":
                return self.generate(body["token_ids"], body["sampling_params"])
        self.answer(200, "{}")

    def generate(self, token_ids: list[int], params: dict[str, Any]) -> None:
        if "prompt_logprobs" in params:
            scored = [None, *({str(token): {"logprob": -2.0}} for token in token_ids[1:])]
            return self.answer(200, json.dumps({"choices": [], "prompt_logprobs": scored}))
        with self.server.lock:
            self.server.prompts.append(token_ids)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            fault = self.server.faults.pop(0) if self.server.faults else ""
        time.sleep(0.02)
        with self.server.lock:
            self.server.now -= 1
        sampled = [params["seed"] + i for i in range(params["max_tokens"])]
        choice = {
            "token_ids": sampled,
            "logprobs": {"content": [{"token_id": token, "logprob": -0.5} for token in sampled]},
            "finish_reason": "abort" if fault == "abort" else "length",
            "weight_versions": [
                {"version": "default" if fault == "old" else self.server.version, "start": 0, "end": len(sampled)}
            ],
        }
        if fault == "others":
            choice["token_ids"] = [token + 1 for token in sampled]
        if fault == "hang":
            time.sleep(1.5)
        if fault == "broken":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            self.close_connection = True
        elif fault.isdecimal():
            self.answer(int(fault), "no")
        else:
            self.answer(200, json.dumps({"choices": [choice]}))

    def complete(self, body: dict[str, Any]) -> None:
        """Tokens are keyed by text in `tokens`, which is '' for those without; `token_ids` has them."""
        prompt = body["prompt"]
        if "prompt_logprobs" in body:
            scored = [None, *({str(token): {"logprob": -2.0}} for token in prompt[1:])]
            return self.answer(200, json.dumps({"choices": [{"prompt_logprobs": scored}]}))
        assert body["return_token_ids"] and body["logprobs"] == 0
        sampled = [body["seed"] + i for i in range(body["max_tokens"])]
        if self.server.faults and self.server.faults.pop() == "new weights":
            self.server.version = str(int(self.server.version) + 1)
        logprobs = {"token_logprobs": [-0.5] * len(sampled), "tokens": [""] * len(sampled)}
        choice = {"token_ids": sampled, "logprobs": logprobs, "finish_reason": "length"}
        self.answer(200, json.dumps({"choices": [choice]}))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RETRY_S", 0.02)
    monkeypatch.setattr(engine_module, "ERROR_RETRY_S", 0.05)


def attach(
    processes: Processes,
    folder: Path,
    *urls: str,
    trainer: float = -2.0,
    max_running: int = 8,
    apart: Any = None,
) -> ServedEngine:
    """`trainer`: its log-probability of any token."""
    settings = replace(SETTINGS, urls=urls, sync_dir=str(folder))
    spec = EngineSpec(VLLM_SERVER, settings, max_length=100, max_running_requests=max_running)
    check = WeightCheck(lambda ids: [trainer] * (len(ids) - 1), make_probe(50, 100), max_gap=1e-4)
    engine = ServedEngine(spec, check, processes, folder, apart=apart)
    engine.load_weights(iter(WEIGHTS.items()), version=3)
    return engine


def generate(engine: ServedEngine, number: int = 4) -> list[Completion]:
    async def everything() -> list[Completion]:
        requests = (engine.generate([i], Sampling(max_new_tokens=2, seed=10 * i)) for i in range(number))
        return await asyncio.gather(*requests)

    return asyncio.run(everything())


EXPECTED = [Completion([10 * i, 10 * i + 1], [-0.5, -0.5], "length", [3, 3]) for i in range(4)]


ADAPTER = adapter_tensors("a", torch.ones(1, 3), torch.ones(2, 1), 2.0)


class Parts:
    """Weights and an adapter; `drawn` has what was asked for, and that all of it was drawn."""

    def __init__(self, at_base: Callable[[], object] = lambda: None) -> None:
        """Call `at_base` before each weight of the base."""
        self.drawn: list[str] = []
        self.at_base = at_base

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.drawn.append("base")
        for each in WEIGHTS.items():
            self.at_base()
            yield each
        self.drawn.append("all")

    def adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.drawn.append("adapters")
        yield from ADAPTER.items()
        self.drawn.append("all")


def test_a_base_is_sent_once_and_loaded_with_every_adapter(
    stand_in: StandIn, processes: Processes, tmp_path: Path
) -> None:
    parts = Parts()
    engine = attach(processes, tmp_path, stand_in.url, apart=parts)
    engine.load_weights(iter(WEIGHTS.items()), version=4)
    assert parts.drawn == ["base", "all", "adapters", "all", "adapters", "all"]
    assert stand_in.loaded.keys() == WEIGHTS.keys() | ADAPTER.keys()
    assert engine.pool is not None
    stand_in.loaded = {}  # as of a server that starts again
    assert engine.pool.sync.restore(0) == ""
    assert stand_in.loaded.keys() == WEIGHTS.keys() | ADAPTER.keys()


def test_adapters_are_drawn_where_the_base_cannot_be_written(
    stand_in: StandIn, processes: Processes, tmp_path: Path
) -> None:
    """The other processes draw them too."""
    parts = Parts(lambda: [shutil.rmtree(folder) for folder in tmp_path.glob("rl2-weights-*")])
    with pytest.raises(EngineFailed, match="could not be written"):
        attach(processes, tmp_path, stand_in.url, apart=parts)
    assert parts.drawn == ["base", "all", "adapters", "all"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["abort", "old", "broken", "500", "503", "others", "hang"])
def test_a_sample_that_is_lost_is_made_again_and_once(
    fault: str, stand_in: StandIn, processes: Processes, tmp_path: Path
) -> None:
    engine = attach(processes, tmp_path, stand_in.url)
    stand_in.faults = [fault, fault]
    assert generate(engine) == EXPECTED
    assert len(stand_in.prompts) == 6
    assert engine.router.outstanding == [0]
    assert engine.metrics()["engine/retried"] in (1, 2)  # one may have met both
    assert engine.metrics()["engine/retried"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "said"), [("500", "HTTP 500 no"), ("hang", "no answer in time")])
def test_a_server_that_never_answers_as_it_should_ends_the_run(
    fault: str, said: str, stand_in: StandIn, processes: Processes, tmp_path: Path
) -> None:
    engine = attach(processes, tmp_path, stand_in.url)
    stand_in.faults = [fault] * 100
    with pytest.raises(EngineFailed, match=f"has failed 3 times in .*{said}"):
        generate(engine, 1)


def test_a_request_that_is_wrong_is_not_tried_again(stand_in: StandIn, processes: Processes, tmp_path: Path) -> None:
    engine = attach(processes, tmp_path, stand_in.url)
    stand_in.faults = ["400"]
    with pytest.raises(ValueError, match="no"):
        generate(engine, 1)
    assert len(stand_in.prompts) == 1


def test_another_server_takes_over_while_one_is_away(stand_in: StandIn, processes: Processes, tmp_path: Path) -> None:
    gone = StandIn()
    engine = attach(processes, tmp_path, gone.url, stand_in.url)
    gone.shutdown()
    gone.server_close()
    assert generate(engine) == EXPECTED


@pytest.mark.slow
def test_servers_that_are_all_away_are_not_waited_for_without_end(processes: Processes, tmp_path: Path) -> None:
    gone = StandIn()
    engine = attach(processes, tmp_path, gone.url)
    gone.shutdown()
    gone.server_close()
    begun = time.monotonic()
    with pytest.raises(EngineFailed, match=r"has failed 0 times in 2 s, at last: .*[Cc]onnect"):
        generate(engine, 1)
    assert time.monotonic() - begun < 5
    with pytest.raises(EngineFailed, match=f"weights of version 4: {gone.url}"):
        engine.load_weights(iter(WEIGHTS.items()), version=4)


def test_a_server_without_the_route_for_tokens_is_asked_for_completions(
    stand_in: StandIn, processes: Processes, tmp_path: Path
) -> None:
    stand_in.has_tokens_route = False
    engine = attach(processes, tmp_path, stand_in.url)
    assert generate(engine) == EXPECTED
    # its answers say no versions, so one that may have several is made again
    stand_in.faults = ["new weights"]
    completions = generate(engine)
    assert [completion.token_ids for completion in completions] == [expected.token_ids for expected in EXPECTED]
    assert [4, 4] in [completion.versions for completion in completions]
    assert all(completion.versions in ([3, 3], [4, 4]) for completion in completions)
    assert engine.metrics()["engine/retried"] >= 1


def test_no_more_requests_are_under_way_than_the_server_needs(
    stand_in: StandIn, processes: Processes, tmp_path: Path
) -> None:
    engine = attach(processes, tmp_path, stand_in.url, max_running=8)
    assert len({tuple(completion.token_ids) for completion in generate(engine, 60)}) == 60
    assert stand_in.most <= 10
    metrics = engine.metrics()
    assert metrics["engine/queue_s"] > 0.5  # 3 s of 6 requests at the server, and what they waited here
    assert metrics["engine/imbalance"] == 1


def test_weights_arrive_and_are_compared(stand_in: StandIn, processes: Processes, tmp_path: Path) -> None:
    engine = attach(processes, tmp_path, stand_in.url)
    assert stand_in.loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(stand_in.loaded[name], weight) for name, weight in WEIGHTS.items())
    engine.load_weights(iter(WEIGHTS.items()), version=4)
    assert engine.metrics()["engine/probe_gap"] == 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1  # of the newest
    engine.close()
    assert not list(tmp_path.rglob("*.safetensors"))
    for trainer in (-2.1, float("nan")):
        with pytest.raises(EngineFailed, match=r"weights of version 3: .* computes with others than the trainer"):
            attach(processes, tmp_path, stand_in.url, trainer=trainer)


def test_members_of_a_group_stay_together_and_groups_spread() -> None:
    router, prompts = Router(3), [[1] * 5, [2] * 5, [3] * 5, [4] * 9]
    homes = [[router.choose(prompt, 10) for _ in range(4)] for prompt in prompts[:3]]
    assert sorted(set(map(tuple, homes))) == [(0,) * 4, (1,) * 4, (2,) * 4]
    router.release(1, 40)
    assert router.choose(prompts[3], 10) == 1
    # a later turn begins with an earlier one
    assert router.choose([*prompts[1], 7, 8, 9], 10) == homes[1][0]
    # who has to go elsewhere stays there
    assert [router.choose(prompts[0], 10, frozenset({0})) for _ in range(2)] == [1, 1]
    assert router.choose(prompts[0], 10) == 1
    assert router.outstanding == [40, 50, 40]
    assert router.imbalance() == pytest.approx(90 / 170 * 3)
    router.forget()
    assert router.choose([*prompts[1], 7], 10) == 0


def test_buckets_are_bounded_and_hold_everything(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.randn(10, i + 1) for i in range(8)}
    weights["shared"] = weights["w3"][:, 1:]  # neither contiguous nor a memory of its own
    files = write(iter(weights.items()), tmp_path, "v-", bucket_bytes=500)
    read = [load_file(tmp_path / file) for file in files]
    assert [sum(x.nbytes for x in each.values()) <= 500 for each in read] == [True] * len(files)
    assert len(files) > 2
    whole = {name: x for each in read for name, x in each.items()}
    assert whole.keys() == weights.keys()
    assert all(torch.equal(whole[name], weight) for name, weight in weights.items())


def test_the_folder_of_a_process_that_died_is_removed(tmp_path: Path) -> None:
    script = (
        "from RL2.engines.served.owned_dirs import *; import sys\n"
        f"own = OwnedDir(Path({str(tmp_path)!r}), 'own-'); print(own.path)"
    )
    wait = "; sys.stdout.flush(); sys.stdin.read()"
    alive = subprocess.Popen([sys.executable, "-c", script + wait], stdin=-1, stdout=-1, text=True)
    assert alive.stdin is not None and alive.stdout is not None
    living = Path(alive.stdout.readline().strip())
    dead = Path(subprocess.run([sys.executable, "-c", script], stdout=-1, text=True, check=True).stdout.strip())
    assert living.is_dir() and dead.is_dir()
    mine = OwnedDir(tmp_path, "own-")
    assert living.is_dir() and not dead.exists() and mine.path.is_dir()
    alive.communicate()
    mine.remove()
    assert not mine.path.exists()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    def server(python: str) -> Server:
        how = {"log": tmp_path / "log", "folder": tmp_path / "temporary"}
        return Server(
            VLLM_SERVER, python, ["--no-such-thing"], {}, "token", name="vLLM server 0", port=free_port(), **how
        )

    with pytest.raises(EngineFailed, match=r"cannot be started.*rollout\.vllm\.python"):
        server("/no/such/python").start()
    broken = server(sys.executable)  # the trainer's environment has no vLLM
    broken.start()
    with pytest.raises(EngineFailed, match=r"(?s)ended while it started; the end of .*No module named 'vllm'"):
        broken.wait_until_healthy(60)
    broken.stop()
    assert not broken.folder.exists()


RL = (
    "train_data.path=rows.jsonl",
    "train_data.prompts_per_rollout=4",
    "rollout.train_sampling_params.max_new_tokens=16",
    f"rollout.env_path={__file__}",
    "actor.model_name=model",
    "actor.max_length_per_device=512",
    "trainer.experiment_name=test",
)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.vllm.urls=[http://x]"], "have no effect with rollout.engine=embedded"),
        (
            ["rollout.engine=vllm", "rollout.speculation=auto"],
            "rollout.speculation=auto is for rollout.engine=embedded",
        ),
        (["rollout.vllm.env.A=1"], "have no effect with rollout.engine=embedded"),
        (
            ["rollout.engine=vllm", "rollout.vllm.urls=[http://x]", "rollout.vllm.num_servers=2"],
            "apply only to servers that RL2 launches",
        ),
        (["rollout.engine=vllm", "rollout.train_sampling_params.temperature=0.005"], "is below 0.01"),
        (["rollout.engine=vllm", "rollout.vllm.python=/no/python"], "there is no such interpreter"),
        (["rollout.engine=vlm"], "choose one of embedded, vllm, sglang"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_here(load("spo", [*RL, *overrides]))


def test_any_environment_variable_can_be_set() -> None:
    config = load("spo", [*RL, "rollout.engine=vllm", "rollout.vllm.env.CUDA_VISIBLE_DEVICES='4,5'"])
    assert config.rollout.vllm.env == {"CUDA_VISIBLE_DEVICES": "4,5"}
