"""Who looks after the servers of a machine: starts them, gives them weights, starts dead ones again."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from RL2.config import Servers
from RL2.engines.served.client import ServerError, gap
from RL2.engines.served.folders import SHARED_MEMORY, SHORT, OwnFolder
from RL2.engines.served.kind import Kind
from RL2.engines.served.server import POLL_S, EngineFailed, Server
from RL2.engines.served.weight_files import write

HEALTH_EVERY_S, HEALTH_TIMEOUT_S = 10, 60


@dataclass(frozen=True)
class Addresses:
    """The servers that a process sends requests to."""

    urls: list[str]
    token: str
    notice: Path
    """A file that the keeper writes when it gives the servers up: why."""


class Keeper:
    """Starts the servers, gives them weights, starts dead ones again."""

    def __init__(
        self,
        kind: Kind,
        settings: Servers,
        arguments: list[str],
        probe: list[int],
        max_probe_gap: float,
        log_folder: Path,
    ) -> None:
        self.kind, self.settings, self.probe, self.max_probe_gap = kind, settings, probe, max_probe_gap
        self.temporary = OwnFolder(SHORT, f"rl2-{kind.key}-{os.getuid()}-")
        if settings.sync_dir is None:
            parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else SHORT
            self.shared: OwnFolder | None = OwnFolder(parent, f"rl2-weights-{os.getuid()}-")
            self.folder = self.shared.path
        else:
            self.shared = None
            Path(settings.sync_dir).mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="rl2-weights-", dir=settings.sync_dir)).resolve()
        token = os.environ.get(kind.token_variable, "") if settings.urls else secrets.token_urlsafe(32)
        name = kind.key if os.environ.get("GROUP_RANK", "0") == "0" else f"{kind.key}-node{os.environ['GROUP_RANK']}"
        self.servers = [
            Server(
                kind,
                settings.python,
                arguments,
                settings.env,
                token,
                name=f"{kind.name} server {i}",
                log=log_folder / f"{name}-{i}.log",
                folder=self.temporary.path / str(i),
            )
            for i in range(0 if settings.urls else settings.num_servers)
        ]
        self.clients = [kind.client(url, token) for url in settings.urls] or [server.client for server in self.servers]
        self.addresses = Addresses([client.url for client in self.clients], token, log_folder / f"{name}-given-up.txt")
        self.lock = threading.Lock()
        """Held while servers start or take weights."""
        self.closing = threading.Event()
        self.watch = threading.Thread(target=self._watch, name=f"{kind.key}-keeper", daemon=True)
        self.files: list[str] = []
        self.version, self.expected = -1, [0.0]
        self.writes = self.restarts = 0
        self.gaps: dict[int, float] = {}
        """Of the last comparison with each server, in nats."""
        self.queued = [(0.0, 0)] * len(self.clients)

    def start(self) -> None:
        """Raises `EngineFailed` if a server does not come up."""
        self.addresses.notice.unlink(missing_ok=True)
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait_until_healthy(self.settings.start_timeout_s)
        for client in self.clients:
            try:
                client.use_folder(str(self.folder))
            except (ServerError, ValueError) as error:
                raise EngineFailed(f"the {self.kind.name} server at {client.url} takes no weights: {error}") from error
        if self.servers:
            self.watch.start()

    def write(self, weights: Iterator[tuple[str, Tensor]]) -> list[str]:
        """Files of the weights that stay until the next ones are in place: a server that starts again needs them."""
        self.writes += 1
        try:
            (self.folder / str(self.writes)).mkdir()
            return write(weights, self.folder, f"{self.writes}/", self.settings.bucket_mib * 2**20)
        except (OSError, SafetensorError) as error:
            raise EngineFailed(
                f"the weights for the {self.kind.name} servers could not be written: {error}; "
                f"rollout.{self.kind.key}.sync_dir chooses another place than {self.folder.parent}"
            ) from error

    def pause(self) -> None:
        with self.lock:
            for client in self.clients:
                with contextlib.suppress(ServerError):  # one that has died stands still too
                    client.pause()

    def load(self, files: list[str], version: int, expected: list[float]) -> None:
        """Give `files` to all servers, and compare what they make of the probe with `expected`."""
        with self.lock:
            old, self.files = self.files, files
            self.version, self.expected, self.gaps = version, expected, {}
            with ThreadPoolExecutor(len(self.clients)) as pool:
                failed = list(pool.map(self._give, range(len(self.clients))))
            for i, problem in enumerate(failed):
                if problem and self.servers:
                    # not in the pool: a server ends with the thread that started it
                    self._restart(i, problem)
                elif problem:
                    raise EngineFailed(f"weights of version {version}: {self.clients[i].url}: {problem}")
            for folder in {(self.folder / file).parent for file in old}:
                shutil.rmtree(folder)

    def _give(self, i: int) -> str:
        """Give server i the newest weights, and compare; returns what went wrong, if something did.

        Raises `EngineFailed` if it then has other weights than the trainer.
        """
        try:
            self.clients[i].load_weights(self.files, str(self.version))
            apart = gap(self.clients[i].logps(self.probe), self.expected)
        except (ServerError, ValueError) as error:
            return str(error)
        self.gaps[i] = apart
        if apart > self.max_probe_gap:
            raise EngineFailed(
                f"weights of version {self.version}: the {self.kind.name} server at {self.clients[i].url} computes "
                f"with others than the trainer. Over a probe of {len(self.probe)} tokens their log-probabilities are "
                f"{apart:g} nats apart in the mean, more than {self.max_probe_gap:g} "
                f"(rollout.{self.kind.key}.max_probe_gap)"
            )
        return ""

    def _watch(self) -> None:
        """Thread: start servers again that have ended or do not answer, with the newest weights."""
        asked = time.monotonic()
        while not self.closing.wait(POLL_S):
            ask = time.monotonic() - asked > HEALTH_EVERY_S
            for i, server in enumerate(self.servers):
                with self.lock:
                    try:
                        if not server.is_running:
                            self._restart(i, "it ended")
                        elif ask and not server.client.is_healthy(HEALTH_TIMEOUT_S):
                            self._restart(i, f"it did not answer within {HEALTH_TIMEOUT_S} s")
                    except EngineFailed as error:
                        if not self.closing.is_set():
                            self.addresses.notice.write_text(str(error))
                        return
            if ask:
                asked = time.monotonic()

    def _restart(self, i: int, problem: str) -> None:
        """Start server i again until it stands; raises `EngineFailed` if that was once too often."""
        server = self.servers[i]
        while problem:
            last_words = server.last_words
            server.stop()
            if self.closing.is_set():
                raise EngineFailed("closed")
            if self.restarts == self.settings.max_restarts:
                raise EngineFailed(
                    f"{server.name}: {problem}, after {self.restarts} restarts "
                    f"(rollout.{self.kind.key}.max_restarts); {last_words}"
                )
            self.restarts += 1
            problem = self._bring_up(i)

    def _bring_up(self, i: int) -> str:
        """Start server i, give it the newest weights, and compare; returns what went wrong, if something did."""
        server = self.servers[i]
        server.start()
        try:
            server.wait_until_healthy(self.settings.start_timeout_s)
            server.client.use_folder(str(self.folder))
        except (EngineFailed, ServerError, ValueError) as error:
            return str(error).partition("; the end of")[0].removeprefix(f"{server.name} ")
        return self._give(i) if self.files else ""

    def metrics(self) -> dict[str, float]:
        metrics = {"engine/probe_gap": max(self.gaps.values(), default=0.0), "engine/restarts": float(self.restarts)}
        try:
            now = [client.queue_times() for client in self.clients]
        except ServerError:  # it is starting again: the next ones tell
            return metrics
        # a server that has started again counts from 0
        new = [(s - s0, n - n0) if n >= n0 else (s, n) for (s, n), (s0, n0) in zip(now, self.queued, strict=True)]
        self.queued = now
        number = sum(n for _, n in new)
        return metrics | {"engine/queue_s": sum(s for s, _ in new) / max(1, number)}

    def close(self) -> None:
        """End the servers that were launched, and remove what they were given; may be called again."""
        self.closing.set()
        for server in self.servers:
            server.stop()
        if self.watch.is_alive():
            self.watch.join(10)
            for server in self.servers:  # one may just have been started again
                server.stop()
        for folder in filter(None, (self.temporary, self.shared)):
            folder.remove()
        shutil.rmtree(self.folder, ignore_errors=True)
