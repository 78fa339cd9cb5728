"""The server processes of one machine: start, health checks, restarts, shutdown."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from RL2.engines.served.client import ServerError
from RL2.engines.served.owned_dirs import SHORT, OwnedDir
from RL2.engines.served.server import POLL_S, EngineFailed, Server, free_port
from RL2.engines.served.server_spec import EngineSpec
from RL2.engines.served.weight_sync import WeightCheck, WeightSync

HEALTH_EVERY_S, HEALTH_TIMEOUT_S = 10, 60


@dataclass(frozen=True)
class Addresses:
    """The servers that a process sends requests to."""

    urls: list[str]
    token: str
    notice: Path
    """A file with the reason, written when the pool gives up a server."""


class ServerPool:
    """Servers launched on this machine, or attached ones; a thread restarts those that die or hang."""

    def __init__(self, engine: EngineSpec, check: WeightCheck, log_dir: Path, device: torch.device) -> None:
        """Prepare the servers; `start` launches them. `device` has the weights that are sent to them."""
        spec, settings = engine.server, engine.settings
        self.spec, self.settings = spec, settings
        self.temporary = OwnedDir(SHORT, f"rl2-{spec.key}-{os.getuid()}-")
        token = os.environ.get(spec.token_variable, "") if settings.urls else secrets.token_urlsafe(32)
        node = os.environ.get("GROUP_RANK", "0")
        log_name = spec.key if node == "0" else f"{spec.key}-node{node}"
        ports: list[int] = []
        for _ in range(0 if settings.urls else settings.num_servers):
            ports.append(free_port(ports))
        self.servers = [
            Server(
                spec,
                settings.python,
                engine.arguments,
                settings.env,
                token,
                name=f"{spec.name} server {i}",
                log=log_dir / f"{log_name}-{i}.log",
                folder=self.temporary.path / str(i),
                port=port,
            )
            for i, port in enumerate(ports)
        ]
        self.clients = [spec.client(url, token) for url in settings.urls] or [each.client for each in self.servers]
        self.addresses = Addresses([each.url for each in self.clients], token, log_dir / f"{log_name}-given-up.txt")
        self.sync = WeightSync(engine, self.clients, check, device)
        self.lock = threading.Lock()
        """Held while servers start or take weights."""
        self.closing = threading.Event()
        self.watch = threading.Thread(target=self._watch, name=f"{spec.key}-pool", daemon=True)
        self.restarts = 0
        self.queue_times = [(0.0, 0)] * len(self.clients)

    def start(self) -> None:
        """Launch all servers and wait until they are healthy. Raises `EngineFailed` if one is not."""
        self.addresses.notice.unlink(missing_ok=True)
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait_until_healthy(self.settings.start_timeout_s)
        self.sync.attach()
        if self.servers:
            self.watch.start()

    def send(self, weights: Iterator[tuple[str, Tensor]], base: Iterator[tuple[str, Tensor]] | None = None) -> None:
        """Transfer new weights to the servers, as `WeightSync.send` does; `load` puts them in place."""
        # files are written without the servers, so one may restart meanwhile, unless the weights in place change
        with self.lock if self.sync.stream is not None or self.sync.changes is not None else nullcontext():
            self.sync.send(weights, base)

    def load(self, version: int, expected: list[float]) -> None:
        """Put the sent weights in place, compare with `expected`, and restart servers that fail to take them.

        Raises `EngineFailed` if an attached server fails, or if any computes with other weights than the trainer.
        """
        with self.lock:
            for i, problem in self.sync.load(version, expected).items():
                if not self.servers:
                    raise EngineFailed(f"weights of version {version}: {self.clients[i].url}: {problem}")
                # in this thread, which lives on: a server ends with the thread that started it
                self._restart(i, problem)

    def pause(self) -> None:
        """Suspend all requests until the next `load`."""
        with self.lock:
            self.sync.pause()

    def _watch(self) -> None:
        """Restart servers that have ended or do not answer, with the newest weights (runs in a thread)."""
        last_check = time.monotonic()
        while not self.closing.wait(POLL_S):
            checks_health = time.monotonic() - last_check > HEALTH_EVERY_S
            for i, server in enumerate(self.servers):
                with self.lock:
                    try:
                        if not server.is_running:
                            self._restart(i, "it ended")
                        elif checks_health and not server.client.is_healthy(HEALTH_TIMEOUT_S):
                            self._restart(i, f"it did not answer within {HEALTH_TIMEOUT_S} s")
                    except EngineFailed as error:
                        if not self.closing.is_set():
                            self.addresses.notice.write_text(str(error))
                        return
            if checks_health:
                last_check = time.monotonic()

    def _restart(self, i: int, problem: str) -> None:
        """Restart server `i` until it is healthy and current. Raises `EngineFailed` beyond `max_restarts`."""
        server = self.servers[i]
        while problem:
            last_words = server.last_words
            server.stop()
            if self.closing.is_set():
                raise EngineFailed("closed")
            if self.restarts == self.settings.max_restarts:
                raise EngineFailed(
                    f"{server.name}: {problem}, after {self.restarts} restarts "
                    f"(rollout.{self.spec.key}.max_restarts); {last_words}"
                )
            self.restarts += 1
            self.sync.forget(i)
            problem = self._start_again(i)

    def _start_again(self, i: int) -> str:
        """Start server `i` with the newest weights; return the problem, '' if there is none."""
        server = self.servers[i]
        server.start()
        try:
            server.wait_until_healthy(self.settings.start_timeout_s)
        except EngineFailed as error:
            return str(error).partition("; the end of")[0].removeprefix(f"{server.name} ")
        return self.sync.restore(i)

    def metrics(self) -> dict[str, float]:
        """Return the restarts so far, the gap at the last sync, and the mean queue time since the last call."""
        metrics = {"engine/probe_gap": self.sync.max_gap, "engine/restarts": float(self.restarts)}
        metrics |= self.sync.metrics()
        try:
            now = [client.queue_times() for client in self.clients]
        except ServerError:  # a server is restarting; the next call counts its requests
            return metrics
        # a restarted server counts from 0
        new = [(s - s0, n - n0) if n >= n0 else (s, n) for (s, n), (s0, n0) in zip(now, self.queue_times, strict=True)]
        self.queue_times = now
        number = sum(n for _, n in new)
        return metrics | {"engine/queue_s": sum(s for s, _ in new) / max(1, number)}

    def close(self) -> None:
        """Stop the launched servers and remove their files; may be called again."""
        self.closing.set()
        for server in self.servers:
            server.stop()
        if self.watch.is_alive():
            self.watch.join(10)
            for server in self.servers:  # one may have been restarted meanwhile
                server.stop()
        self.temporary.remove()
        self.sync.close()
