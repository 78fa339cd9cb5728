"""Weights of the servers: send new ones, put them in place, and compare the servers with the trainer."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from RL2.engines.served import weight_stream
from RL2.engines.served.buckets import in_buckets, write, write_bucket
from RL2.engines.served.client import Client, DeltaClient, ServerError, StreamClient, gap
from RL2.engines.served.delta import SentWeights
from RL2.engines.served.owned_dirs import SHARED_MEMORY, SHORT, OwnedDir
from RL2.engines.served.server import EngineFailed
from RL2.engines.served.server_spec import EngineSpec
from RL2.engines.served.weight_stream import Stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightCheck:
    """The comparison of a server with the trainer after each sync of the weights."""

    trainer_logps: Callable[[list[int]], list[float]]
    """Returns the trainer's log-probability of each token but the first, at temperature 1 (collective)."""
    probe: list[int]
    """Token ids that both score."""
    max_gap: float
    """Maximum mean abs difference of their log-probabilities, in nats."""


class Stage(Enum):
    """Progress of a server with the weights that were sent last."""

    FILES = auto()
    """It will read them from files."""
    STREAMED = auto()
    """It has received every bucket so far, from memory."""
    REFUSED = auto()
    """It failed to receive a bucket, so it will read files."""
    CURRENT = auto()
    """It computes with the newest weights."""


@dataclass
class ServerState:
    """One server as the weight sync sees it."""

    name: str
    client: Client
    stage: Stage = Stage.FILES
    problem: str = ""
    """Why it failed to receive the last weights from memory; '' if it received them."""
    holds: str = ""
    """Label of the weights that changes may apply to; '' if it has none, so that it needs all."""
    gap: float = 0.0
    """Mean abs difference to the trainer's log-probabilities at the last comparison, in nats."""


class WeightSync:
    """The trainer's weights on all servers: `send` transfers new ones, `load` puts them in place.

    With a stream, weights go from memory to memory. Files are kept beside it where a restarted server needs them. With
    `changes`, files have what differs from the weights before; a server that lacks these gets all.
    """

    def __init__(self, engine: EngineSpec, clients: list[Client], check: WeightCheck, device: torch.device) -> None:
        """Stream the weights from buckets on `device`, or write files, as `engine.transport` says."""
        settings = engine.settings
        self.spec, self.check, self.device = engine.server, check, device
        self.states = [ServerState(f"{self.spec.name} server {i}", client) for i, client in enumerate(clients)]
        self.stream = weight_stream.make_stream(engine.transport, device)
        self.keeps_files = self.stream is None or (not settings.urls and settings.max_restarts > 0)
        """True if weights are (also) written to files, which a restarted server reads."""
        self.owned: OwnedDir | None = None
        if settings.sync_dir is None:
            self.owned = OwnedDir(SHARED_MEMORY if SHARED_MEMORY.is_dir() else SHORT, f"rl2-weights-{os.getuid()}-")
            self.folder = self.owned.path
        else:
            Path(settings.sync_dir).mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="rl2-weights-", dir=settings.sync_dir)).resolve()
        self.changes = SentWeights(self.folder.name) if engine.transport == "delta" else None
        self.sent_whole = 0
        """Servers that got all weights at the last sync, although changes were sent."""
        self.writing = threading.Lock()
        self.bucket_bytes = settings.bucket_mib * 2**20
        self.sends = 0
        self.base: list[str] = []
        """Files of weights that never change, which the servers load with the newest ones."""
        self.sent: list[str] = []
        """Files of the weights that `load` will put in place."""
        self.files: list[str] = []
        """Files of the newest weights that are in place."""
        self.version, self.expected = -1, [0.0]

    def attach(self) -> None:
        """Tell every server where the files of weights will be. Raises `EngineFailed` if one refuses."""
        for state in self.states if self.keeps_files else []:
            try:
                state.client.use_folder(str(self.folder))
            except (ServerError, ValueError) as error:
                raise EngineFailed(
                    f"the {self.spec.name} server at {state.client.url} refuses weights: {error}"
                ) from error

    def send(self, weights: Iterator[tuple[str, Tensor]], base: Iterator[tuple[str, Tensor]] | None = None) -> None:
        """Transfer `weights`, which the servers use after `load`. Raises `EngineFailed`.

        The files of the weights in place stay until `load`: a server that restarts meanwhile reads them. `base` is
        written to files that are kept; the servers load it with these and all later weights.
        """
        self.sends += 1
        prefix = f"{self.sends}/"
        self.sent = []
        try:
            if base is not None:
                (self.folder / "base").mkdir()
                self.base = write(base, self.folder, "base/", self.bucket_bytes)
            if self.keeps_files:
                (self.folder / prefix).mkdir()
            if self.changes is not None:
                weights = self.changes.changes(weights)
            if self.stream is None:
                self.sent = write(weights, self.folder, prefix, self.bucket_bytes)
            else:
                self._send_buckets(self.stream, weights, prefix)
                self.stream.free()  # no bucket is referenced any more
        except (OSError, SafetensorError) as error:
            raise EngineFailed(
                f"the weights for the {self.spec.name} servers could not be written: {error}; "
                f"rollout.{self.spec.key}.sync_dir chooses another place than {self.folder.parent}"
            ) from error

    def _send_buckets(self, stream: Stream, weights: Iterator[tuple[str, Tensor]], prefix: str) -> None:
        clients = {i: state.client for i, state in enumerate(self.states) if isinstance(state.client, StreamClient)}
        for i in clients:
            self.states[i].stage, self.states[i].problem = Stage.STREAMED, ""
        try:
            self._refuse(stream.start(clients))
            for bucket in in_buckets(weights, self.bucket_bytes, self.device):
                if self.keeps_files:
                    self.sent.append(write_bucket(bucket, self.folder, prefix, len(self.sent)))
                if receivers := {i: client for i, client in clients.items() if self._has_all(i)}:
                    self._refuse(stream.send(bucket, receivers))
        except BaseException:
            for i, client in clients.items():
                if self._has_all(i):
                    client.abandon_update()
            raise

    def _has_all(self, i: int) -> bool:
        return self.states[i].stage is Stage.STREAMED

    def _refuse(self, problems: dict[int, str]) -> None:
        """Send these servers no more buckets. Raises `EngineFailed` if there are no files to fall back on."""
        for i, problem in problems.items():
            state = self.states[i]
            assert isinstance(state.client, StreamClient)
            state.stage, state.problem = Stage.REFUSED, problem
            if state.client.is_healthy(weight_stream.HEALTH_TIMEOUT_S):
                state.client.abandon_update()
            if not self.keeps_files:
                raise EngineFailed(f"weights for the {self.spec.name} server at {state.client.url}: {problem}")
            logger.warning("%s takes weights from files this time: %s", state.name, problem.partition("\n")[0])

    def load(self, version: int, expected: list[float]) -> dict[int, str]:
        """Put the sent weights in place on all servers, and compare with `expected`, the trainer's log-probabilities.

        Returns the problem of each server that failed. Raises `EngineFailed` if one computes with other weights.
        """
        self.files, self.sent_whole = self.sent, 0
        self.version, self.expected = version, expected
        for state in self.states:
            state.gap = 0.0
        with ThreadPoolExecutor(len(self.states)) as threads:
            problems = list(threads.map(self._load_one, self.states))
        for folder in self.folder.iterdir():
            if folder.name.isdecimal() and folder.name != str(self.sends):
                shutil.rmtree(folder)
        return {i: problem for i, problem in enumerate(problems) if problem}

    def _load_one(self, state: ServerState) -> str:
        """Put the newest weights in place on one server and compare; return the problem, '' if there is none.

        Raises `EngineFailed` if it then computes with other weights than the trainer.
        """
        client = state.client
        try:
            if state.stage is Stage.STREAMED:
                state.stage = Stage.FILES  # a restarted server has received nothing
                assert isinstance(client, StreamClient)
                client.finish_update(str(self.version))
            elif state.stage is Stage.REFUSED and not client.is_healthy(weight_stream.HEALTH_TIMEOUT_S):
                return state.problem  # it would not answer this call either
            elif self.changes is not None:
                self._load_changes(state, self.changes)
            else:
                client.load_weights([*self.base, *self.files], str(self.version))
            apart = gap(client.logps(self.check.probe), self.expected)
        except (ServerError, ValueError) as error:
            return str(error)
        state.gap = apart
        if apart > self.check.max_gap:
            raise EngineFailed(
                f"weights of version {self.version}: the {self.spec.name} server at {client.url} computes with others "
                f"than the trainer. Over a probe of {len(self.check.probe)} tokens their log-probabilities are "
                f"{apart:g} nats apart on average, more than {self.check.max_gap:g} "
                f"(rollout.{self.spec.key}.max_probe_gap)"
            )
        state.stage = Stage.CURRENT
        return ""

    def _load_changes(self, state: ServerState, changes: SentWeights) -> None:
        """Give one server what changed, and compare checksums; all weights if it lacks those before or refuses."""
        client, held, state.holds = state.client, state.holds, ""
        assert isinstance(client, DeltaClient)
        refused = bool(changes.follows) and held != changes.follows
        if not refused:
            try:
                client.load_changes(self.files, changes.follows, changes.label, str(self.version), changes.checksums)
            except (ServerError, ValueError) as error:
                if not changes.follows or not client.is_healthy(weight_stream.HEALTH_TIMEOUT_S):
                    raise
                logger.warning("%s takes all weights this time: %s", state.name, str(error).partition("\n")[0])
                refused = True
        if refused:
            files = self._whole_files(changes)
            client.load_changes(files, "", changes.label, str(self.version), changes.checksums)
        state.holds = changes.label

    def _whole_files(self, changes: SentWeights) -> list[str]:
        """Return files of all weights as they were sent last, written when the first server needs them."""
        prefix = f"{self.sends}/whole/"
        with self.writing:
            self.sent_whole += 1
            if not (folder := self.folder / prefix).exists():
                (half := self.folder / f"{self.sends}/half").mkdir()
                write(iter(changes.weights.items()), self.folder, f"{self.sends}/half/", self.bucket_bytes)
                half.rename(folder)
        return [f"{prefix}{file.name}" for file in sorted(folder.iterdir())]

    def forget(self, i: int) -> None:
        """Note that server `i` has stopped: it has received nothing, and the stream has lost a member."""
        self.states[i].stage, self.states[i].holds = Stage.FILES, ""
        if self.stream is not None:
            self.stream.forget()

    def restore(self, i: int) -> str:
        """Give server `i`, which was started again, the newest weights; return the problem, '' if there is none."""
        state = self.states[i]
        try:
            state.client.use_folder(str(self.folder))
        except (ServerError, ValueError) as error:
            return str(error)
        if self.changes is not None and self.files is not self.sent:
            return ""  # the weights that were in place are gone; the next `load` gives it all of the new ones
        return self._load_one(state) if self.version >= 0 else ""

    def pause(self) -> None:
        """Suspend all requests; servers that can do without memory leave it to others until the next `load`."""
        for state in self.states:
            try:
                state.client.pause()
            except ServerError:  # a server that has died does not compute either
                continue

    def metrics(self) -> dict[str, float]:
        """Return metrics of the last sync of changes."""
        if self.changes is None:
            return {}
        return {"engine/delta_share": self.changes.sent_share, "engine/sent_whole": float(self.sent_whole)}

    @property
    def max_gap(self) -> float:
        """The largest difference to the trainer at the last comparison, in nats."""
        return max((state.gap for state in self.states), default=0.0)

    def close(self) -> None:
        """Remove all files; may be called again."""
        if self.owned is not None:
            self.owned.remove()
        shutil.rmtree(self.folder, ignore_errors=True)
