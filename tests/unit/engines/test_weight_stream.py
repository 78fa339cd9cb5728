"""Weights from memory to memory, without servers: buckets, groups, addresses, calls that are never answered."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from RL2.config.load import load
from RL2.engines.make import make_engine
from RL2.engines.served import weight_stream as streams
from RL2.engines.served.buckets import in_buckets, write_bucket
from RL2.engines.served.client import ServerError
from RL2.engines.served.weight_stream import Broadcast, Calls, own_address
from RL2.engines.served.wire import rl2_wire
from RL2.engines.served.wire.rl2_wire import Entry, Group, address_toward, bytes_of, tensors
from RL2.engines.vllm.client import VLLMClient
from RL2.errors import ConfigError

CPU = torch.device("cpu")
WEIGHTS = {
    **{f"w{i}": torch.randn(10, i + 1) for i in range(8)},
    "half": torch.randn(7).bfloat16(),
    "large": torch.randn(40, 30),
    "one": torch.tensor(3.0),
    "none": torch.zeros(0, 4),
    "whole": torch.arange(5),
    "turned": torch.randn(6, 4).T,
    "tracked": torch.nn.Parameter(torch.randn(3)),
}


def test_buckets_are_bounded_and_hold_everything(tmp_path: Path) -> None:
    got: dict[str, torch.Tensor] = {}
    sizes, places = [], set()
    for number, bucket in enumerate(in_buckets(iter(WEIGHTS.items()), 1000, CPU)):
        assert bytes_of(bucket.entries) == bucket.flat.numel()
        sizes.append(bucket.flat.numel())
        places.add(bucket.flat.data_ptr())
        got |= {name: weight.clone() for name, weight in bucket.tensors().items()}
        in_file = load_file(tmp_path / write_bucket(bucket, tmp_path, "v-", number))
        assert all(torch.equal(in_file[name], weight) for name, weight in bucket.tensors().items())
    assert got.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        assert got[name].dtype == weight.dtype and got[name].shape == weight.shape and torch.equal(got[name], weight)
    assert [size for size in sizes if size > 1000] == [rl2_wire.aligned(40 * 30 * 4)]
    assert len(sizes) > 4 and len(places) == 2  # one memory again and again, and the large one's


def test_no_weights_make_no_bucket() -> None:
    assert list(in_buckets(iter(()), 1000, CPU)) == []


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "w", "dtype": "float33", "shape": [2]}, "float33 is not a torch dtype"),
        ({"name": "w", "dtype": "load", "shape": [2]}, "load is not a torch dtype"),
        ({"name": "w", "dtype": "float32", "shape": [2, -1]}, "is not a shape"),
        ({"name": "w", "dtype": "float32", "shape": [2.5]}, "is not a shape"),
        ({"name": "w", "dtype": "float32", "shape": [65]}, "a bucket of 256 bytes cannot hold weights of 512"),
    ],
)
def test_entries_that_do_not_fit_are_refused(entry: Entry, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        list(tensors(torch.zeros(256, dtype=torch.uint8), [entry]))


def test_the_address_is_the_one_that_servers_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_toward("127.0.0.1", 80) == "127.0.0.1"
    assert own_address(["http://localhost:8000", "http://127.0.0.1:8001"]) in ("127.0.0.1", "::1")
    toward = {"127.0.0.1": "127.0.0.1", "node7": "10.0.0.3", "node8": "10.0.0.3"}
    monkeypatch.setattr(streams, "address_toward", lambda host, port: toward[host])
    assert own_address(["http://127.0.0.1:1", "http://127.0.0.1:2"]) == "127.0.0.1"
    # those on this machine reach it there too, and those elsewhere nowhere else
    assert own_address(["http://127.0.0.1:1", "http://node7:2", "https://node8"]) == "10.0.0.3"


MEMBER = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from RL2.engines.served.wire.rl2_wire import Group, address_toward

port, what = int(sys.argv[1]), sys.argv[2]
store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
group = Group("gloo", store, 1, 2, torch.device("cpu"), address_toward("127.0.0.1", port), 20)
flat = torch.empty(100_000, dtype=torch.uint8)
group.broadcast(flat)
print(int(flat.sum()), flush=True)
if what == "goes":
    sys.exit()
if what == "leaves":
    group.leave()
if what in ("leaves", "hangs"):
    time.sleep(30)
begun = time.monotonic()
try:
    group.broadcast(torch.empty(50_000_000, dtype=torch.uint8))
except RuntimeError as error:
    print(f"{time.monotonic() - begun < 10} {type(error).__name__}", flush=True)
"""


@pytest.fixture
def member(request: pytest.FixtureRequest) -> Iterator[tuple[Group, subprocess.Popen[str]]]:
    """A group of this process and one that does as the parameter says."""
    store = streams._listening("127.0.0.1")
    command = [sys.executable, "-c", MEMBER, str(store.port), request.param]
    with subprocess.Popen(command, stdout=-1, text=True) as process:
        group = Group("gloo", store, 0, 2, CPU, "127.0.0.1", timeout_s=20)
        group.broadcast(torch.full((100_000,), 3, dtype=torch.uint8))
        yield group, process
        process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


LARGE = torch.zeros(50_000_000, dtype=torch.uint8)


@pytest.mark.parametrize("member", ["stays", "goes", "leaves"], indirect=True, ids=str)
def test_a_group_carries_bytes_and_notices_who_goes(
    member: tuple[Group, subprocess.Popen[str]], request: pytest.FixtureRequest
) -> None:
    group, process = member
    assert said(process) == "300000"
    if "stays" in request.node.name:
        group.broadcast(LARGE)
    else:
        begun = time.monotonic()
        with pytest.raises(RuntimeError):
            group.broadcast(LARGE)
        assert time.monotonic() - begun < 10
    group.leave()


@pytest.mark.parametrize("member", ["hangs"], indirect=True, ids=str)
def test_a_member_that_hangs_is_given_up(member: tuple[Group, subprocess.Popen[str]]) -> None:
    group, process = member
    assert said(process) == "300000"
    late = time.monotonic() + 1
    with pytest.raises(RuntimeError, match="not all take part"):
        group.broadcast(LARGE, lambda: time.monotonic() > late)
    begun = time.monotonic()
    group.leave()
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("member", ["stays"], indirect=True, ids=str)
def test_those_that_wait_are_told_when_the_trainer_leaves(member: tuple[Group, subprocess.Popen[str]]) -> None:
    group, process = member
    assert said(process) == "300000"
    group.leave()
    assert said(process) == "True RuntimeError"


def test_a_group_that_does_not_come_together_is_not_waited_for_without_end() -> None:
    begun = time.monotonic()
    with pytest.raises(RuntimeError):
        Group("gloo", streams._listening("127.0.0.1"), 0, 2, CPU, "127.0.0.1", timeout_s=1)
    assert time.monotonic() - begun < 20


class Recorder(VLLMClient):
    """Of the calls that a server would get; those in `faults` fail."""

    def __init__(self, *faults: str) -> None:
        super().__init__("http://127.0.0.1:1", "")
        self.faults, self.calls = list(faults), list[str]()

    def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 0) -> Any:
        name = "/abandon" if body and "abandon" in body.get("update_info", {}) else path
        self.calls.append(name.removeprefix("/").removesuffix("_weight_update").removesuffix("?mode=keep"))
        if name in self.faults:
            self.faults.remove(name)
            raise ServerError("HTTP 500")


WHOLE = ["pause", "start", "update_weights", "finish", "resume"]


def test_requests_go_on_when_weights_are_of_one_version_and_only_then() -> None:
    client = Recorder("/abandon", "/update_weights", "/finish_weight_update")
    client.start_update()
    client.abandon_update()  # nothing has come yet
    assert client.calls == ["pause", "start", "abandon", "resume"]
    client.calls.clear()
    client.start_update()
    with pytest.raises(ServerError):
        client.update({})
    client.abandon_update()
    with pytest.raises(ServerError):
        client.load_weights(["file"], "1")
    assert client.calls == ["pause", "start", "update_weights", "abandon", *WHOLE[:-1], "abandon"]
    client.calls.clear()
    client.load_weights(["file"], "2")
    assert client.calls == WHOLE


def test_a_file_that_is_refused_leaves_the_old_weights_and_requests_go_on() -> None:
    client = Recorder("/update_weights")
    with pytest.raises(ServerError):
        client.load_weights(["file"], "1")
    assert client.calls == ["pause", "start", "update_weights", "abandon", "resume"]


def test_an_update_that_was_left_open_is_closed_first() -> None:
    client = Recorder("/start_weight_update")
    client.load_weights(["file"], "1")
    assert client.calls == ["pause", "start", "abandon", *WHOLE[1:]]


def test_a_server_that_sleeps_wakes_in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recorder, "can_sleep", True)
    client = Recorder()
    client.pause()
    client.pause()
    client.load_weights(["file"], "1")
    woken = ["sleep?level=2&mode=keep", "wake_up?tags=weights", *WHOLE[1:4], "wake_up?tags=kv_cache", "resume"]
    assert client.calls == woken
    client.calls.clear()
    client.load_weights(["file"], "2")
    assert client.calls == WHOLE
    client.pause()
    client.use_folder("new")  # it was started again
    assert not client.is_asleep and client.is_whole


class Stub(VLLMClient):
    """A server on whose workers nothing depends."""

    def __init__(self, fault: str = "", is_well: bool = True) -> None:
        super().__init__("http://127.0.0.1:1", "")
        self.fault, self.is_well = fault, is_well
        self.over = threading.Event()

    def call(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 0) -> Any:
        if path == "/health" and self.is_well:
            return None
        if path == "/get_world_size":
            return {"world_size": 2}
        if path == self.fault == "/start_weight_update":
            self.over.wait(10)
        if path in ("/health", self.fault):
            raise ServerError("HTTP 500")

    def join(self, group: dict[str, Any]) -> None:
        raise ServerError("another NCCL")


def test_a_call_that_a_dead_engine_leaves_unanswered_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HEALTH_EVERY_S", 0.1)
    clients = {0: Stub(), 1: Stub("/start_weight_update", is_well=False), 2: Stub("/pause?mode=keep")}
    begun = time.monotonic()
    calls = Calls(clients, lambda i, client: client.start_update() or i)
    assert calls.wait() == {1: "it no longer responds", 2: "HTTP 500"}
    assert calls.results == {0: 0} and time.monotonic() - begun < 5
    clients[1].over.set()


def test_servers_that_are_well_and_form_no_group_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next sync would do no better; of one that has died it would."""
    monkeypatch.setattr(streams, "BUCKET_TIMEOUT_S", 1)
    with pytest.raises(streams.EngineFailed, match="could not form a group of gloo: another NCCL; another NCCL"):
        Broadcast(CPU).start({0: Stub(), 1: Stub()})
    assert Broadcast(CPU).start({0: Stub(), 1: Stub(is_well=False)}) == dict.fromkeys((0, 1), "another NCCL")


RL = (
    "train_data.path=none",
    "train_data.prompts_per_rollout=4",
    "rollout.train_sampling_params.max_new_tokens=16",
    "rollout.env_path=none",
    "actor.model_name=model",
    "actor.max_length_per_device=512",
    "trainer.experiment_name=test",
)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.vllm.transport=nccl"], "files, delta, ipc, broadcast"),
        (["rollout.sglang.transport=ipc"], "rollout.sglang.transport"),
    ],
)
def test_transports_that_are_none_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load("spo", [*RL, *overrides])


def test_ipc_needs_a_gpu(tmp_path: Path) -> None:
    actor: Any = SimpleNamespace(processes=SimpleNamespace(device=CPU), dtype=torch.float32)
    config = load("spo", [*RL, "rollout.engine=vllm", "rollout.vllm.transport=ipc"])
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.transport=ipc .* there is no GPU"):
        make_engine(config.rollout, actor, str, 512, tmp_path)


def test_a_gpu_that_the_server_does_not_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(rl2_wire, "_uuid", lambda device: f"GPU-{device}")
    shared = {"gpu": "GPU-7", "handle": [], "offset": 0, "size": 4}
    with pytest.raises(ValueError, match="does not see the trainer's GPU GPU-7, but GPU-0, GPU-1"):
        rl2_wire.opened(shared)
    with pytest.raises(ValueError, match="has 0 parts, not 7"):
        rl2_wire.opened(shared | {"gpu": "GPU-1"})


def test_the_store_listens_to_its_address_alone() -> None:
    store = streams._listening("127.0.0.1")
    other = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5))
    other.set("a", "b")
    assert store.get("a") == b"b"
    elsewhere = "127.0.0.2"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((elsewhere, store.port), timeout=5)
