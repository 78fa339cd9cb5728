"""Weights on their way to servers from memory to memory, in buckets: what is the trainer's part of it."""

from __future__ import annotations

import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.config.rollout import Transport
from RL2.engines.served.client import ServerError, StreamClient
from RL2.engines.served.server import EngineFailed
from RL2.engines.vllm.plugin.rl2_transfer import Backend, Entry, Group, address_toward, aligned, entry, share, tensors
from RL2.errors import first_line

BUCKET_TIMEOUT_S = 120
"""Of one broadcast, and until all have come together."""
POLL_S, HEALTH_EVERY_S, HEALTH_TIMEOUT_S = 0.1, 2, 30
"""While a call is waited for."""


@dataclass(frozen=True)
class Bucket:
    flat: Tensor
    """[bytes] uint8. Its memory is used again for the next one."""
    entries: list[Entry]
    """What is in it, one behind the other."""

    def tensors(self) -> dict[str, Tensor]:
        return dict(tensors(self.flat, self.entries))


def packed(weights: Iterator[tuple[str, Tensor]], bucket_bytes: int, device: torch.device) -> Iterator[Bucket]:
    """The weights, copied on `device` into buckets of at most `bucket_bytes`; one that is larger has one of its own."""
    buffer: Tensor | None = None
    entries: list[Entry] = []
    size = 0
    for name, weight in weights:
        needed = aligned(weight.nbytes)
        if entries and size + needed > bucket_bytes:
            assert buffer is not None
            yield Bucket(buffer[:size], entries)
            entries, size = [], 0
        if needed > bucket_bytes:
            alone = torch.empty(needed, dtype=torch.uint8, device=device)
            yield Bucket(_put(weight, name, alone), [entry(name, weight)])
            continue
        if buffer is None:
            buffer = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
        _put(weight, name, buffer[size : size + needed])
        entries, size = [*entries, entry(name, weight)], size + needed
    if entries:
        assert buffer is not None
        yield Bucket(buffer[:size], entries)


def _put(weight: Tensor, name: str, place: Tensor) -> Tensor:
    ((_, view),) = tensors(place, [entry(name, weight)])
    view.copy_(weight.detach())
    return place


Clients = Mapping[int, StreamClient]
Problems = dict[int, str]
"""What went wrong, by the number of the server."""


class Stream(ABC):
    """A way for buckets. Every server is told of each at the same time; those that fail get no more."""

    def start(self, clients: Clients) -> Problems:
        return each(clients, lambda client: client.start_update())

    @abstractmethod
    def send(self, bucket: Bucket, clients: Clients) -> Problems: ...

    @abstractmethod
    def forget(self) -> None:
        """A server was started again: what it had agreed to is gone."""

    @abstractmethod
    def free(self) -> None:
        """All buckets were sent, and are not held any more."""


class SharedMemory(Stream):
    """Servers on this machine look at the bucket where it lies on the trainer's GPU (CUDA IPC)."""

    def __init__(self) -> None:
        self.workers: dict[int, int] = {}

    def start(self, clients: Clients) -> Problems:
        problems = super().start(clients)
        asked = Calls({i: clients[i] for i in clients if i not in problems}, lambda _, client: client.num_workers())
        problems |= asked.wait()
        self.workers = asked.results
        return problems

    def send(self, bucket: Bucket, clients: Clients) -> Problems:
        torch.cuda.synchronize(bucket.flat.device)  # the copies into it are done
        # a handle is for one process: memory counts as used until each that was made has been let go of, once
        infos: dict[int, list[dict[str, Any]]] = {
            i: [{"entries": bucket.entries, "shared": share(bucket.flat)} for _ in range(self.workers[i])]
            for i in clients
        }
        return Calls(clients, lambda i, client: client.update(infos[i])).wait()

    def forget(self) -> None:
        pass

    def free(self) -> None:
        torch.cuda.ipc_collect()


class Broadcast(Stream):
    """Trainer and workers form a group: of NCCL where the weights lie on a GPU, else of gloo."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.group: Group | None = None

    def start(self, clients: Clients) -> Problems:
        problems = super().start(clients)
        if problems:
            self.forget()  # it may be of them
        there = {i: client for i, client in clients.items() if i not in problems}
        return problems | self._form(there) if there and self.group is None else problems

    def _form(self, clients: Clients) -> Problems:
        """Raises EngineFailed if servers that are well do not come together: the next sync would do no better."""
        asked = Calls(clients, lambda _, client: client.num_workers())
        problems, sizes = asked.wait(), asked.results
        there = {i: client for i, client in clients.items() if i in sizes}
        if not there:
            return problems
        first_ranks, size = {}, 1
        for i, number in sizes.items():
            first_ranks[i], size = size, size + number
        backend: Backend = "nccl" if self.device.type == "cuda" else "gloo"
        host = own_address([client.url for client in there.values()])
        store = _listening(host)
        said = {"backend": backend, "host": host, "port": store.port, "size": size, "timeout_s": BUCKET_TIMEOUT_S}
        problem = ""
        joins = Calls(there, lambda i, client: client.join({**said, "first_rank": first_ranks[i]}))
        try:
            self.group = Group(backend, store, 0, size, self.device, host, BUCKET_TIMEOUT_S)
        except RuntimeError as error:
            problem = first_line(error)
        failed = joins.wait()
        if not problem and not failed:
            return problems
        self.forget()
        failed = {i: failed.get(i, problem) for i in there}
        if all(client.is_healthy(HEALTH_TIMEOUT_S) for client in there.values()):
            raise EngineFailed(f"trainer and servers could not form a group of {backend}: {'; '.join(failed.values())}")
        return problems | failed

    def send(self, bucket: Bucket, clients: Clients) -> Problems:
        if self.group is None:
            return dict.fromkeys(clients, "the group of the broadcast has broken")
        problem = ""
        updates = Calls(clients, lambda _, client: client.update({"entries": bucket.entries}))
        try:
            self.group.broadcast(bucket.flat, updates.have_failed)
        except RuntimeError as error:
            problem = first_line(error)
            self.forget()
        failed = updates.wait()
        if failed:  # its workers have left the group
            self.forget()
        return failed or (dict.fromkeys(clients, problem) if problem else {})

    def forget(self) -> None:
        if self.group is not None:
            self.group.leave()
            self.group = None

    def free(self) -> None:
        pass


def make_stream(transport: Transport, device: torch.device) -> Stream | None:
    """None: weights go through files."""
    match transport:
        case "files":
            return None
        case "ipc":
            return SharedMemory()
        case "broadcast":
            return Broadcast(device)


def _listening(host: str) -> dist.TCPStore:
    """Where those that join a group find each other."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))  # and to no other address
        listener.listen()
        return dist.TCPStore(
            host,
            listener.getsockname()[1],
            is_master=True,
            timeout=timedelta(seconds=BUCKET_TIMEOUT_S),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )


def own_address(urls: list[str]) -> str:
    """The address of this machine that servers at all `urls` reach: loopback only if all of them are here."""
    places = [urlsplit(url) for url in urls]
    seen = [address_toward(place.hostname or "", place.port or 80) for place in places]
    return next((address for address in seen if address not in ("127.0.0.1", "::1")), seen[0])


class Calls:
    """The same call to several servers at the same time.

    One whose engine has died may leave a call unanswered for ever, so those that take long are asked how they are.
    """

    def __init__(self, clients: Clients, do: Callable[[int, StreamClient], Any]) -> None:
        self.clients = clients
        self.results: dict[int, Any] = {}
        self.problems: Problems = {}
        self.threads = {i: threading.Thread(target=self._call, args=(i, do), daemon=True) for i in clients}
        self.asked = time.monotonic()
        for thread in self.threads.values():
            thread.start()

    def _call(self, i: int, do: Callable[[int, StreamClient], Any]) -> None:
        try:
            self.results[i] = do(i, self.clients[i])
        except (ServerError, ValueError) as error:
            self.problems.setdefault(i, str(error))

    def have_failed(self) -> bool:
        """Some have, so far."""
        if time.monotonic() - self.asked > HEALTH_EVERY_S:
            for i in self.clients.keys() - self.results.keys() - self.problems.keys():
                if not self.clients[i].is_healthy(HEALTH_TIMEOUT_S):
                    self.problems.setdefault(i, "it does not answer any more")
            self.asked = time.monotonic()
        return bool(self.problems)

    def wait(self) -> Problems:
        """What went wrong with any, when all are over."""
        for i, thread in self.threads.items():
            while thread.is_alive() and i not in self.problems:
                thread.join(POLL_S)
                self.have_failed()
        return {i: problem for i, problem in self.problems.items() if i not in self.results}


def each(clients: Clients, do: Callable[[StreamClient], Any]) -> Problems:
    return Calls(clients, lambda _, client: do(client)).wait()
