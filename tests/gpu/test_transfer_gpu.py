"""Weights from one process's GPU memory to another's: what servers on GPUs need, without a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from RL2.engines.served.buckets import Bucket, in_buckets
from RL2.engines.served.weight_stream import SharedMemory, _listening
from RL2.engines.served.wire.rl2_wire import Group, bytes_of, entry, share
from RL2.engines.vllm.client import VLLMClient

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)
MIB = 2**20

OTHER = """
import json, sys
import torch
from RL2.engines.served.wire.rl2_wire import bytes_of, opened, tensors

torch.zeros(1, device="cuda")  # its context takes memory once and for all
print("ready", flush=True)
for line in sys.stdin:
    info = json.loads(line)
    try:  # as RL2/engines/vllm/plugin/rl2_plugin.py does
        theirs = opened(info["shared"])
        ours = theirs[: bytes_of(info["entries"])].to("cuda", copy=True)
        torch.cuda.synchronize()
        del theirs
        torch.cuda.ipc_collect()
        answer = {name: weight.double().sum().item() for name, weight in tensors(ours, info["entries"])}
        del ours
        torch.cuda.empty_cache()
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Other(VLLMClient):
    """A process of its own in the place of a server's worker: it says the sums of what it got."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", "")
        self.process = subprocess.Popen([sys.executable, "-c", OTHER], cwd=ROOT, stdin=-1, stdout=-1, text=True)
        self.got: dict[str, Any] = {}
        assert self.process.stdout is not None and self.process.stdout.readline().strip() == "ready"

    def start_update(self) -> None:
        pass

    def num_workers(self) -> int:
        return 1

    def update(self, info: dict[str, Any] | list[dict[str, Any]]) -> None:
        (info,) = info if isinstance(info, list) else [info]
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(info), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise ValueError(answer["error"])
        self.got |= answer


@pytest.fixture(scope="module")
def others() -> Iterator[dict[int, Other]]:
    others = {0: Other(), 1: Other()}
    yield others
    for other in others.values():
        other.process.kill()
        other.process.wait()


def started(others: dict[int, Other]) -> SharedMemory:
    stream = SharedMemory()
    assert stream.start(others) == {}
    return stream


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Whose sum is exact in any type and order."""
    return torch.randint(-8, 8, shape, device=CUDA).to(dtype)


def test_two_processes_see_each_bucket_and_the_memory_is_free_afterwards(others: dict[int, Other]) -> None:
    """One buffer is used again and again; a weight that is larger has its own."""
    weights = {f"w{i}": whole_numbers(200, 1000) for i in range(20)}  # 0.8 MB each
    weights |= {"half": whole_numbers(333, dtype=torch.bfloat16), "large": whole_numbers(1000, 2000)}
    torch.cuda.empty_cache()
    allocated, (free, _) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    stream, number = started(others), 0
    for other in others.values():
        other.got.clear()
    for bucket in in_buckets(iter(weights.items()), 4 * MIB, CUDA):
        assert stream.send(bucket, others) == {}
        number += 1
    del bucket
    stream.free()
    assert number > 4
    expected = {name: weight.double().sum().item() for name, weight in weights.items()}
    assert [other.got for other in others.values()] == [expected, expected]
    assert torch.cuda.memory_allocated() == allocated
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info()[0] >= free - 2 * MIB


def test_a_bucket_may_lie_anywhere(others: dict[int, Other]) -> None:
    """Within a tensor, and within what the allocator has asked CUDA for."""
    neighbours = [torch.zeros(5000, dtype=torch.uint8, device=CUDA) for _ in range(4)]
    large = torch.zeros(8 * MIB, dtype=torch.uint8, device=CUDA)
    weight = whole_numbers(200)
    for place in (neighbours[2][1024:2048], large[3 * MIB : 3 * MIB + 1024], neighbours[3][:1024]):
        bucket = Bucket(place, [entry("w", weight)])
        bucket.tensors()["w"].copy_(weight)
        assert started(others).send(bucket, others) == {}
        assert others[0].got["w"] == others[1].got["w"] == weight.double().sum().item()
        weight += 1
    assert bytes_of(bucket.entries) == 1024


def test_what_was_written_last_is_seen(others: dict[int, Other]) -> None:
    """Without a wait in between, after a kernel that takes a while."""
    place, busy = torch.zeros(1024, dtype=torch.uint8, device=CUDA), torch.randn(4000, 4000, device=CUDA)
    for value in range(1, 6):
        for _ in range(10):
            busy = busy @ busy / 4000
        weight = torch.full((256,), float(value), device=CUDA)
        bucket = Bucket(place, [entry("w", weight)])
        bucket.tensors()["w"].copy_(weight)
        assert started(others).send(bucket, others) == {}
        assert others[0].got["w"] == others[1].got["w"] == 256 * value


def test_a_gpu_that_is_not_there_is_named(others: dict[int, Other]) -> None:
    shared = share(torch.zeros(256, dtype=torch.uint8, device=CUDA)) | {"gpu": "another"}
    with pytest.raises(ValueError, match="the server does not see the trainer's GPU another, but"):
        others[0].update({"entries": [], "shared": shared})


MEMBER = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from RL2.engines.served.wire.rl2_wire import Group

store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=timedelta(seconds=60))
group = Group("gloo", store, 1, 2, torch.device("cuda", 0), "127.0.0.1", 60)
flat = torch.zeros(1_000_000, dtype=torch.uint8, device=sys.argv[2])
group.broadcast(flat)
print(int(flat.sum()), flush=True)
"""


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_gloo_takes_the_bytes_of_a_gpu(device: str) -> None:
    store = _listening("127.0.0.1")
    command = [sys.executable, "-c", MEMBER, str(store.port), device]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, text=True) as process:
        group = Group("gloo", store, 0, 2, CUDA, "127.0.0.1", 60)
        group.broadcast(torch.full((1_000_000,), 3, dtype=torch.uint8, device=CUDA))
        group.leave()
        assert process.communicate(timeout=60)[0].strip() == "3000000"


def test_nccl_by_itself() -> None:
    """One GPU has room for one member: that it forms, carries a bucket, and is left, again and again."""
    flat = torch.arange(256, device=CUDA).to(torch.uint8)
    for _ in range(3):
        group = Group("nccl", _listening("127.0.0.1"), 0, 1, CUDA, "127.0.0.1", 60)
        group.broadcast(flat)
        assert flat.tolist() == list(range(256))
        group.leave()
    assert not dist.is_initialized()


def test_nccl_does_not_wait_without_end_for_who_does_not_come() -> None:
    """In a process of its own, in case that it does."""
    script = """
import torch
from RL2.engines.served.weight_stream import _listening
from RL2.engines.served.wire.rl2_wire import Group
try:
    Group("nccl", _listening("127.0.0.1"), 0, 2, torch.device("cuda", 0), "127.0.0.1", 5)
except RuntimeError as error:
    print("given up:", error, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "given up" in done.stdout, done.stderr
