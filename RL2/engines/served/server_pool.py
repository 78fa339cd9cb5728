"""Who looks after the servers of a machine: starts them, gives them weights, starts dead ones again."""

from __future__ import annotations

import contextlib
import logging
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

import torch
from safetensors import SafetensorError
from torch import Tensor

from RL2.config.rollout import Servers
from RL2.engines.served import weight_stream
from RL2.engines.served.client import ServerError, StreamClient, gap
from RL2.engines.served.owned_dirs import SHARED_MEMORY, SHORT, OwnFolder
from RL2.engines.served.server import POLL_S, EngineFailed, Server
from RL2.engines.served.server_spec import Kind
from RL2.engines.served.weight_files import write, write_bucket
from RL2.engines.served.weight_stream import Bucket, Clients, Stream, packed

logger = logging.getLogger(__name__)
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
        stream: Stream | None,
        device: torch.device,
    ) -> None:
        """`stream`: how weights reach the servers, from buckets on `device`; None: in files."""
        self.stream, self.device = stream, device
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
        """Of the newest weights that all servers have."""
        self.keeps_files = stream is None or (bool(self.servers) and settings.max_restarts > 0)
        """A server that starts again needs them."""
        self.sent: list[str] = []
        """Of those that are on their way, which `load` puts in place."""
        self.fed: set[int] = set()
        """Servers that have got them all from memory."""
        self.refused: dict[int, str] = {}
        """Why others have not."""
        self.version, self.expected = -1, [0.0]
        self.bucket_bytes = settings.bucket_mib * 2**20
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
        for client in self.clients if self.keeps_files else []:
            try:
                client.use_folder(str(self.folder))
            except (ServerError, ValueError) as error:
                raise EngineFailed(f"the {self.kind.name} server at {client.url} takes no weights: {error}") from error
        if self.servers:
            self.watch.start()

    def send(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Weights on their way to the servers, which `load` lets them use. Raises `EngineFailed`.

        What is kept in files stays until the next ones are in place: a server that starts again needs it.
        """
        self.writes += 1
        prefix = f"{self.writes}/"
        self.sent = []
        try:
            if self.keeps_files:
                (self.folder / prefix).mkdir()
            if self.stream is None:
                self.sent = write(weights, self.folder, prefix, self.bucket_bytes)
                return
            with self.lock:
                self._stream(self.stream, packed(weights, self.bucket_bytes, self.device), prefix)
                self.stream.free()
        except (OSError, SafetensorError) as error:
            raise EngineFailed(
                f"the weights for the {self.kind.name} servers could not be written: {error}; "
                f"rollout.{self.kind.key}.sync_dir chooses another place than {self.folder.parent}"
            ) from error

    def _stream(self, stream: Stream, buckets: Iterator[Bucket], prefix: str) -> None:
        clients = {i: client for i, client in enumerate(self.clients) if isinstance(client, StreamClient)}
        self.fed, self.refused = set(clients), {}
        try:
            self._refuse(stream.start(clients), clients)
            for bucket in buckets:
                if self.keeps_files:
                    each = Bucket(bucket.flat.cpu(), bucket.entries).tensors()
                    self.sent.append(write_bucket(each, self.folder, prefix, len(self.sent)))
                if self.fed:
                    self._refuse(stream.send(bucket, {i: clients[i] for i in self.fed}), clients)
        except BaseException:
            for i in self.fed:
                clients[i].abandon_update()
            raise

    def _refuse(self, problems: dict[int, str], clients: Clients) -> None:
        """These servers get no more from memory. Raises `EngineFailed` if nothing else can be done."""
        for i, problem in problems.items():
            self.fed.discard(i)
            self.refused[i] = problem
            if clients[i].is_healthy(weight_stream.HEALTH_TIMEOUT_S):
                clients[i].abandon_update()
            if not self.keeps_files:
                raise EngineFailed(f"weights for the {self.kind.name} server at {clients[i].url}: {problem}")
            logger.warning(
                "%s takes weights from files this time: %s", self.servers[i].name, problem.partition("\n")[0]
            )

    def pause(self) -> None:
        with self.lock:
            for client in self.clients:
                with contextlib.suppress(ServerError):  # one that has died stands still too
                    client.pause()

    def load(self, version: int, expected: list[float]) -> None:
        """All servers go on with what was sent; what they make of the probe is compared with `expected`."""
        with self.lock:
            old, self.files = self.files, self.sent
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
            client = self.clients[i]
            if i in self.fed:
                self.fed.remove(i)  # if it starts again it has nothing
                assert isinstance(client, StreamClient)
                client.finish_update(str(self.version))
            elif i in self.refused and not client.is_healthy(weight_stream.HEALTH_TIMEOUT_S):
                return self.refused[i]  # it would not answer this either
            else:
                client.load_weights(self.files, str(self.version))
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
            self.fed.discard(i)
            if self.stream is not None:
                self.stream.forget()
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
