"""What trainer and server have to agree on when weights go from memory to memory. Both ends import it.

A bucket is one flat tensor of bytes with weights one behind the other; what they are is said beside it, in JSON. Its
bytes reach the server in shared memory of a GPU, or by a broadcast.
"""

from __future__ import annotations

import base64
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

ALIGNMENT = 256
"""Of weights in a bucket, in bytes."""
POLL_S = 0.0005
NEVER = timedelta(days=7)


class Entry(TypedDict):
    """One weight of a bucket."""

    name: str
    dtype: str
    """Of torch: bfloat16."""
    shape: list[int]


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def entry(name: str, weight: Tensor) -> Entry:
    return {"name": name, "dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}


def bytes_of(entries: list[Entry]) -> int:
    """Size of a bucket. Raises ValueError for an entry that is none."""
    return sum(aligned(_dtype(each).itemsize * _numel(each)) for each in entries)


def tensors(flat: Tensor, entries: list[Entry]) -> Iterator[tuple[str, Tensor]]:
    """The weights of a bucket, as views. Raises ValueError if they are more than it holds."""
    if bytes_of(entries) > flat.numel():
        raise ValueError(f"a bucket of {flat.numel()} bytes cannot hold weights of {bytes_of(entries)}")
    offset = 0
    for each in entries:
        dtype = _dtype(each)
        size = dtype.itemsize * _numel(each)
        yield each["name"], flat[offset : offset + size].view(dtype).view(each["shape"])
        offset += aligned(size)


def _dtype(each: Entry) -> torch.dtype:
    found = getattr(torch, each["dtype"], None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{each['name']}: {each['dtype']} is no type of torch's")
    return found


def _numel(each: Entry) -> int:
    if any(type(length) is not int or length < 0 for length in each["shape"]):
        raise ValueError(f"{each['name']}: {each['shape']} is no shape")
    return math.prod(each["shape"])


def share(flat: Tensor) -> dict[str, Any]:
    """How a process of the same machine gets at a tensor on a GPU (CUDA IPC), as JSON.

    It has to live, and what is written to it has to be there, while others look at it.
    """
    _, *handle = flat.untyped_storage()._share_cuda_()
    said = [base64.b64encode(each).decode() if isinstance(each, bytes) else each for each in handle]
    return {"gpu": _uuid(flat.device.index), "handle": said, "offset": flat.storage_offset(), "size": flat.numel()}


IS_BYTES = (True, False, False, True, False, True, False)
"""Of a handle: memory, size, offset, counter of users, offset in it, event, whether to wait for it."""


def opened(shared: dict[str, Any]) -> Tensor:
    """The tensor that another process gave to `share`, in its memory; this process has to see the same GPU.

    Raises ValueError if it does not.
    """
    torch.cuda.init()
    mine = [_uuid(i) for i in range(torch.cuda.device_count())]
    if shared["gpu"] not in mine:
        raise ValueError(
            f"the server does not see the trainer's GPU {shared['gpu']}, but {', '.join(mine)}: CUDA_VISIBLE_DEVICES "
            "has to name it too, or the transport to be another"
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
    """The trainer, rank 0, and all workers of all servers; nothing to do with torch.distributed's own groups."""

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
        """Returns when all are there, which takes at most `timeout_s`, as each broadcast does.

        `device` is where a GPU's tensors lie; `host` an address of this machine that the others reach.
        """
        self.timeout_s = timeout_s
        self.is_nccl = backend == "nccl"
        store.set(f"here/{rank}", "")
        # NCCL's own wait has no end
        store.wait([f"here/{other}" for other in range(size)], timedelta(seconds=timeout_s))
        if self.is_nccl:
            torch.cuda.set_device(device)
            options: Any = dist.ProcessGroupNCCL.Options()
            options._timeout = NEVER  # its own watchdog would end the process
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
        """From the trainer to the others. After an error the group is of no use.

        Raises RuntimeError: it took too long, or somebody has left, or `given_up` says that somebody will not come.
        """
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        work = self.group.broadcast([flat], options)
        limit = time.monotonic() + self.timeout_s
        while not work.is_completed():
            if given_up():
                raise RuntimeError("not all take part in the broadcast")
            if time.monotonic() > limit:
                raise RuntimeError(f"the broadcast was not over within {self.timeout_s:g} s")
            time.sleep(POLL_S)
        work.wait()
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def leave(self) -> None:
        """Those that still wait for this process are told so. Once only."""
        if self.is_nccl:
            self.group.abort()
        last = [self.group]
        del self.group
        # the end of a gloo group waits for what is under way, up to its limit
        threading.Thread(target=last.clear, daemon=True).start()


def address_toward(host: str, port: int) -> str:
    """The address of this machine that `host` sees when it is reached from here."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # which sends nothing
        return str(probe.getsockname()[0])
