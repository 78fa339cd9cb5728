"""The trainer's side of weight transfers from memory to memory, bucket by bucket."""

from __future__ import annotations

import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from RL2.config.rollout import Transport
from RL2.engines.served.buckets import Bucket
from RL2.engines.served.client import ServerError, StreamClient
from RL2.engines.served.server import EngineFailed
from RL2.engines.served.wire.rl2_wire import Backend, Group, address_toward, share
from RL2.errors import first_line

BUCKET_TIMEOUT_S = 120
"""Limit of one broadcast, and of forming a group."""
POLL_S, HEALTH_EVERY_S, HEALTH_TIMEOUT_S = 0.1, 2, 30
"""Intervals at which a pending call is polled and its server's health checked, and the limit of that check."""


Clients = Mapping[int, StreamClient]
Problems = dict[int, str]
"""Error messages by server index."""


class Stream(ABC):
    """A transport for buckets, to all servers at the same time. A server that fails gets no further bucket."""

    def start(self, clients: Clients) -> Problems:
        """Suspend requests and begin an update on every server."""
        return each(clients, lambda client: client.start_update())

    @abstractmethod
    def send(self, bucket: Bucket, clients: Clients) -> Problems:
        """Transfer one bucket to every server; its memory may be reused afterwards."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the state shared with the servers, because one of them has restarted."""

    @abstractmethod
    def free(self) -> None:
        """Free the memory of the buckets; all were sent and none is referenced."""


class SharedMemory(Stream):
    """Servers on this machine read each bucket in the memory of the trainer's GPU (CUDA IPC)."""

    def __init__(self) -> None:
        self.workers: dict[int, int] = {}

    def start(self, clients: Clients) -> Problems:
        problems = super().start(clients)
        asked = Calls({i: clients[i] for i in clients if i not in problems}, lambda _, client: client.num_workers())
        problems |= asked.wait()
        self.workers = asked.results
        return problems

    def send(self, bucket: Bucket, clients: Clients) -> Problems:
        torch.cuda.synchronize(bucket.flat.device)  # the copies into the bucket are finished
        # one handle per worker: the memory counts as used until every handle has been closed once
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
    """Trainer and workers form a process group: NCCL if the weights are on a GPU, else gloo."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.group: Group | None = None

    def start(self, clients: Clients) -> Problems:
        problems = super().start(clients)
        if problems:
            self.forget()  # the failed servers may belong to the group
        reachable = {i: client for i, client in clients.items() if i not in problems}
        return problems | self._form(reachable) if reachable and self.group is None else problems

    def _form(self, clients: Clients) -> Problems:
        """Form the group. Raises EngineFailed if healthy servers cannot join, because the next sync would fail too."""
        asked = Calls(clients, lambda _, client: client.num_workers())
        problems, sizes = asked.wait(), asked.results
        reachable = {i: client for i, client in clients.items() if i in sizes}
        if not reachable:
            return problems
        first_ranks, size = {}, 1
        for i, number in sizes.items():
            first_ranks[i], size = size, size + number
        backend: Backend = "nccl" if self.device.type == "cuda" else "gloo"
        host = own_address([client.url for client in reachable.values()])
        store = _listening(host)
        group = {"backend": backend, "host": host, "port": store.port, "size": size, "timeout_s": BUCKET_TIMEOUT_S}
        problem = ""
        joins = Calls(reachable, lambda i, client: client.join({**group, "first_rank": first_ranks[i]}))
        try:
            self.group = Group(backend, store, 0, size, self.device, host, BUCKET_TIMEOUT_S)
        except RuntimeError as error:
            problem = first_line(error)
        failed = joins.wait()
        if not problem and not failed:
            return problems
        self.forget()
        failed = {i: failed.get(i, problem) for i in reachable}
        if all(client.is_healthy(HEALTH_TIMEOUT_S) for client in reachable.values()):
            raise EngineFailed(f"trainer and servers could not form a group of {backend}: {'; '.join(failed.values())}")
        return problems | failed

    def send(self, bucket: Bucket, clients: Clients) -> Problems:
        if self.group is None:
            return dict.fromkeys(clients, "the broadcast group is broken")
        problem = ""
        updates = Calls(clients, lambda _, client: client.update({"entries": bucket.entries}))
        try:
            self.group.broadcast(bucket.flat, updates.have_failed)
        except RuntimeError as error:
            problem = first_line(error)
            self.forget()
        failed = updates.wait()
        if failed:  # workers of the failed servers have left the group
            self.forget()
        return failed or (dict.fromkeys(clients, problem) if problem else {})

    def forget(self) -> None:
        if self.group is not None:
            self.group.leave()
            self.group = None

    def free(self) -> None:
        pass


def make_stream(transport: Transport, device: torch.device) -> Stream | None:
    """Return the stream of a transport, or None for files."""
    match transport:
        case "files" | "delta":
            return None
        case "ipc":
            return SharedMemory()
        case "broadcast":
            return Broadcast(device)


def _listening(host: str) -> dist.TCPStore:
    """Return a store on a free port of `host`, where the members of a group find each other."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))  # and no other address
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
    """Return the address of this machine that the servers at `urls` reach: loopback only if all are local."""
    places = [urlsplit(url) for url in urls]
    seen = [address_toward(place.hostname or "", place.port or 80) for place in places]
    return next((address for address in seen if address not in ("127.0.0.1", "::1")), seen[0])


class Calls:
    """The same call to several servers at the same time.

    A server whose engine has died may never answer, so servers with pending calls are asked for their health.
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
        """Return whether any call has failed so far."""
        if time.monotonic() - self.asked > HEALTH_EVERY_S:
            for i in self.clients.keys() - self.results.keys() - self.problems.keys():
                if not self.clients[i].is_healthy(HEALTH_TIMEOUT_S):
                    self.problems.setdefault(i, "it no longer responds")
            self.asked = time.monotonic()
        return bool(self.problems)

    def wait(self) -> Problems:
        """Wait until every call has ended; return the errors."""
        for i, thread in self.threads.items():
            while thread.is_alive() and i not in self.problems:
                thread.join(POLL_S)
                self.have_failed()
        return {i: problem for i, problem in self.problems.items() if i not in self.results}


def each(clients: Clients, do: Callable[[StreamClient], Any]) -> Problems:
    """Call `do` for all servers at the same time; return the errors."""
    return Calls(clients, lambda _, client: do(client)).wait()
