"""Seconds until another process has a model's weights, for each transport to servers.

    python benchmarks/weight_sync.py [--gib 1.2] [--steps 5] [--json FILE]

The other process represents a server's worker: at the end it has a copy of all weights on its device, and their sums
are compared. With a GPU, both ends are on it. Transports alternate; times are medians.

    files        safetensors in shared memory, written here and read there
    delta        the same with what changed: --changed of all weights; checksums are computed at both ends and compared
    ipc          memory of the GPU that the other process maps (with a GPU)
    broadcast    gloo: NCCL needs a GPU for each end
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from RL2.engines.served.buckets import in_buckets, write
from RL2.engines.served.delta import SentWeights
from RL2.engines.served.owned_dirs import SHARED_MEMORY
from RL2.engines.served.weight_stream import Broadcast, SharedMemory, Stream
from RL2.engines.served.wire.rl2_delta import apply, checksums, differences
from RL2.engines.served.wire.rl2_wire import Group, bytes_of, opened, tensors
from RL2.engines.vllm.client import VLLMClient

BUCKET_BYTES = 512 * 2**20
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def receive() -> None:
    """Run the other process: execute the request on each line."""
    group: Group | None = None
    weights: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    """Weights in host memory, that changes apply to."""
    for line in sys.stdin:
        said = json.loads(line)
        if "group" in said:
            to = said["group"]
            store = dist.TCPStore(to["host"], to["port"], is_master=False, timeout=timedelta(seconds=60))
            group = Group("gloo", store, to["first_rank"], to["size"], DEVICE, to["host"], 60)
        elif "files" in said:
            for file in said["files"]:
                with safe_open(file, framework="pt", device=str(DEVICE)) as stored:
                    weights |= {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118
        elif "changes" in said:
            for file in said["changes"]:
                apply(kept, load_file(file).items())
            weights = {name: weight.to(DEVICE, copy=True) for name, weight in kept.items()}
            print(json.dumps(checksums(kept)), flush=True)
            continue
        elif "entries" in said:
            if "shared" in said:
                flat = opened(said["shared"])[: bytes_of(said["entries"])].clone()
            else:
                assert group is not None
                flat = torch.empty(bytes_of(said["entries"]), dtype=torch.uint8, device=DEVICE)
                group.broadcast(flat)
            weights |= dict(tensors(flat, said["entries"]))
        elif "sums" in said:
            print(json.dumps(float(sum(weight.double().sum() for weight in weights.values()))), flush=True)
            weights = {}
            continue
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.ipc_collect()
        print("null", flush=True)


class Other(VLLMClient):
    """Client of the other process in place of a server."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", "")
        self.process = subprocess.Popen([sys.executable, __file__, "--receive"], stdin=-1, stdout=-1, text=True)

    def tell(self, what: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start_update(self) -> None:
        pass

    def num_workers(self) -> int:
        return 1

    def is_healthy(self, timeout_s: float) -> bool:
        return self.process.poll() is None

    def join(self, group: dict[str, Any]) -> None:
        self.tell({"group": group})

    def update(self, info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.tell(info[0] if isinstance(info, list) else info)


def by_files(weights: dict[str, Tensor], other: Other) -> None:
    parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent) as name:
        files = write(iter(weights.items()), Path(name), "", BUCKET_BYTES)
        other.tell({"files": [f"{name}/{file}" for file in files]})


def by_changes(sent: SentWeights, weights: dict[str, Tensor], other: Other) -> None:
    parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent) as name:
        files = write(sent.changes(iter(weights.items())), Path(name), "", BUCKET_BYTES)
        received = other.tell({"changes": [f"{name}/{file}" for file in files]})
    assert not list(differences(sent.checksums, received)), "other weights"


def by(stream: Stream, weights: dict[str, Tensor], other: Other) -> None:
    clients = {0: other}
    assert not stream.start(clients)
    for bucket in in_buckets(iter(weights.items()), BUCKET_BYTES, DEVICE):
        assert not stream.send(bucket, clients)
        del bucket
    stream.free()


class Gloo(Broadcast):
    """Broadcast with gloo also on a GPU."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    options.add_argument("--gib", type=float, default=1.2)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--changed", type=float, default=0.02, help="share of the weights that change in a step")
    options.add_argument("--json", type=Path, help="write the numbers to this file")
    options.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.receive:
        receive()
        return
    number = max(1, round(arguments.gib * 2**30 / (2 * 1024 * 4096)))
    weights = {f"w{i}": torch.randn(1024, 4096, device=DEVICE).bfloat16() for i in range(number)}
    streams: dict[str, Stream | None] = {"files": None, "delta": None, "broadcast": Gloo()}
    sent = SentWeights("benchmark")
    if DEVICE.type == "cuda":
        streams["ipc"] = SharedMemory()
    other = Other()
    times: dict[str, list[float]] = {way: [] for way in streams}
    for step in range(arguments.steps + 1):
        for weight in weights.values():
            weight.mul_(torch.where(torch.rand(weight.shape, device=DEVICE) < arguments.changed, 1 + 2**-7, 1.0))
        expected = float(sum(weight.double().sum() for weight in weights.values()))
        for way, stream in streams.items():
            begun = time.perf_counter()
            if way == "delta":
                by_changes(sent, weights, other)
            elif stream is None:
                by_files(weights, other)
            else:
                by(stream, weights, other)
            if step:  # the first one prepares
                times[way].append(time.perf_counter() - begun)
            assert abs(other.tell({"sums": True}) - expected) < 1e-6 * abs(expected) + 1e-3, f"{way}: other weights"
    other.process.kill()
    gib = sum(weight.nbytes for weight in weights.values()) / 2**30
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{gib:.2f} GiB of bfloat16 in {number} weights, {name}, torch {torch.__version__}")
    for way, seconds in times.items():
        print(f"  {way:<12}{median(seconds):>8.3f} s{gib / median(seconds):>8.1f} GiB/s")
    print(f"  delta sends {sent.sent_share:.1%} of the bytes")
    if arguments.json:
        arguments.json.write_text(json.dumps({f"{way}_s": median(of) for way, of in times.items()}, indent=1))


if __name__ == "__main__":
    main()
