"""The wire format of weights that go from memory to memory. Trainer and server both import this file.

A bucket is one flat tensor of bytes with several weights; its entries, in JSON, give their names, dtypes and shapes.
The bytes reach the server through shared memory of a GPU or by a broadcast. The server's environment has no RL2, so
this file imports only torch, and its directory is on the server's PYTHONPATH.
"""

from __future__ import annotations

import base64
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 256
"""Alignment of weights in a bucket, in bytes."""
POLL_S = 0.0005
NEVER = timedelta(days=7)
DOWN, UP, SCALE = ".rl2_down", ".rl2_up", ".rl2_scale"
"""Endings of the names of an adapter's tensors, after the name of the weight that it is added to."""


class Entry(TypedDict):
    """One weight of a bucket."""

    name: str
    dtype: str
    """Name in torch, such as bfloat16."""
    shape: list[int]


def aligned(size: int) -> int:
    """Return `size` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def entry(name: str, weight: Tensor) -> Entry:
    """Describe a weight."""
    return {"name": name, "dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}


def bytes_of(entries: list[Entry]) -> int:
    """Return the size of a bucket. Raises ValueError for an invalid entry."""
    return sum(aligned(_dtype(each).itemsize * _numel(each)) for each in entries)


def tensors(flat: Tensor, entries: list[Entry]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a bucket, as views. Raises ValueError if it is too small for them."""
    if bytes_of(entries) > flat.numel():
        raise ValueError(f"a bucket of {flat.numel()} bytes cannot hold weights of {bytes_of(entries)}")
    offset = 0
    for each in entries:
        dtype = _dtype(each)
        size = dtype.itemsize * _numel(each)
        yield each["name"], flat[offset : offset + size].view(dtype).view(each["shape"])
        offset += aligned(size)


def adapter_tensors(weight_name: str, down: Tensor, up: Tensor, scale: float) -> dict[str, Tensor]:
    """Return the tensors of an adapter by name."""
    scales = torch.tensor([scale], dtype=torch.float64)
    return {f"{weight_name}{DOWN}": down, f"{weight_name}{UP}": up, f"{weight_name}{SCALE}": scales}


def is_adapter(name: str) -> bool:
    """Return whether a tensor of this name belongs to an adapter."""
    return name.endswith((DOWN, UP, SCALE))


def with_adapter(name: str, weight: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
    """Return a weight with its adapter, if it has one, added in float32, as the trainer does."""
    if f"{name}{DOWN}" not in adapters:
        return weight
    down, up, scale = (adapters[f"{name}{part}"] for part in (DOWN, UP, SCALE))
    return weight.float().addmm(up, down, alpha=float(scale))


def _dtype(each: Entry) -> torch.dtype:
    found = getattr(torch, each["dtype"], None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{each['name']}: {each['dtype']} is not a torch dtype")
    return found


def _numel(each: Entry) -> int:
    if any(type(length) is not int or length < 0 for length in each["shape"]):
        raise ValueError(f"{each['name']}: {each['shape']} is not a shape")
    return math.prod(each["shape"])


def share(flat: Tensor) -> dict[str, Any]:
    """Return a handle, as JSON, with which another process of this machine can open a tensor on a GPU (CUDA IPC).

    The tensor must stay alive, and writes to it must be finished, while other processes read it.
    """
    _, *handle = flat.untyped_storage()._share_cuda_()
    said = [base64.b64encode(each).decode() if isinstance(each, bytes) else each for each in handle]
    return {"gpu": _uuid(flat.device.index), "handle": said, "offset": flat.storage_offset(), "size": flat.numel()}


IS_BYTES = (True, False, False, True, False, True, False)
"""True if each part of a handle is bytes: memory, size, offset, reference counter and its offset, event, wait flag."""


def opened(shared: dict[str, Any]) -> Tensor:
    """Open the tensor of a handle made by `share`, without a copy. Raises ValueError if its GPU is not visible here."""
    torch.cuda.init()
    mine = [_uuid(i) for i in range(torch.cuda.device_count())]
    if shared["gpu"] not in mine:
        raise ValueError(
            f"the server does not see the trainer's GPU {shared['gpu']}, but {', '.join(mine)}: CUDA_VISIBLE_DEVICES "
            "must name it too, or choose another transport"
        )
    if len(shared["handle"]) != len(IS_BYTES):
        raise ValueError(f"the handle of shared memory has {len(shared['handle'])} parts, not {len(IS_BYTES)}")
    handle = [
        base64.b64decode(each) if is_bytes else each for each, is_bytes in zip(shared["handle"], IS_BYTES, strict=True)
    ]
    device = mine.index(shared["gpu"])
    storage = torch.UntypedStorage._new_shared_cuda(device, *handle)
    flat = torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}")
    return flat.set_(storage, shared["offset"], (shared["size"],), (1,))


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


Backend = Literal["nccl", "gloo"]


class Group:
    """A process group of the trainer (rank 0) and all workers of all servers, apart from torch.distributed's own."""

    def __init__(
        self,
        backend: Backend,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        host: str,
        timeout_s: float,
    ) -> None:
        """Join the group; returns when all members have. Joining and each broadcast take at most `timeout_s`.

        `device` is the GPU of the tensors, for NCCL; `host` is an address of this machine that the others reach.
        """
        self.timeout_s = timeout_s
        self.is_nccl = backend == "nccl"
        store.set(f"here/{rank}", "")
        # NCCL itself would wait without limit
        store.wait([f"here/{other}" for other in range(size)], timedelta(seconds=timeout_s))
        if self.is_nccl:
            torch.cuda.set_device(device)
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = NEVER  # NCCL's own watchdog would end the process
            self.group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timedelta(seconds=timeout_s)
            options._devices = [gloo.create_device(hostname=host)]
            options._threads = 1
            self.group = gloo(store, rank, size, options)
            device = torch.device("cpu")
        try:
            self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device))  # NCCL connects at the first one
        except BaseException:
            self.leave()
            raise

    def broadcast(self, flat: Tensor, given_up: Callable[[], bool] = lambda: False) -> None:
        """Send `flat` from the trainer to the others. The group cannot be used after an error.

        Raises RuntimeError if it takes too long, a member has left, or `given_up` returns True.
        """
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        work = self.group.broadcast([flat], options)
        limit = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if given_up():
                raise RuntimeError("not all take part in the broadcast")
            if time.monotonic() > limit:
                raise RuntimeError(f"the broadcast did not finish within {self.timeout_s:g} s")
            time.sleep(POLL_S)
        work.wait()
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def leave(self) -> None:
        """Leave the group, which ends the waiting of the other members; to be called once."""
        if self.is_nccl:
            self.group.abort()
        last = [self.group]
        del self.group
        # destroying a gloo group waits for pending operations, up to their limit
        threading.Thread(target=last.clear, daemon=True).start()


def address_toward(host: str, port: int) -> str:
    """Return the address of this machine as `host` sees it."""
    family, type_, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, type_) as probe:
        probe.connect(address)  # of a datagram socket: sends nothing
        return str(probe.getsockname()[0])
