"""Servers as the engine: launched on this machine, or running ones that the run attaches to.

On each machine one process owns the server pool: it starts the servers, sends them new weights and restarts them when
they die. Attached servers get their weights from the first process of the run. Every process sends requests to all
servers of its machine, or to all attached ones.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal

import httpx
from torch import Tensor

from RL2.engines.served.apart import Apart
from RL2.engines.served.client import Answer, ServerError
from RL2.engines.served.router import Router
from RL2.engines.served.server import EngineFailed
from RL2.engines.served.server_pool import Addresses, ServerPool
from RL2.engines.served.server_spec import EngineSpec
from RL2.engines.served.weight_sync import WeightCheck
from RL2.models.conversion import StoredLayout, own_name
from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling

TRIES = 3
"""Attempts per request that a server answers with an error or not in time; failures to connect do not count."""
RETRY_S = 0.5
ERROR_RETRY_S = 5
"""Pause after an error that the server reported: one whose engine has died takes 4 s to end."""
PROBE_LENGTH = 64


def make_probe(vocab_size: int, max_length: int) -> list[int]:
    """Return the fixed token ids on which servers and trainer are compared."""
    draw = random.Random(0)
    return [draw.randrange(vocab_size) for _ in range(min(PROBE_LENGTH, max_length - 1))]


class ServedEngine:
    """An `Engine` that sends its requests to servers.

    Each sample is produced exactly once: a response that is lost, aborted or of older weights is dropped, and the
    request is retried with the same seed.
    """

    def __init__(
        self,
        spec: EngineSpec,
        check: WeightCheck,
        processes: Processes,
        log_dir: Path,
        layout: StoredLayout = own_name,
        apart: Apart | None = None,
    ) -> None:
        """Launch the servers or attach to them (collective). Raises `EngineFailed` if one does not come up.

        They get weights in the layout of a checkpoint; with `apart`, its base once, and then its adapters.
        """
        self.spec, self.check, self.processes, self.layout, self.apart = spec, check, processes, layout, apart
        settings, name = spec.settings, spec.server.name
        self.version = -1
        self.pool: ServerPool | None = None
        """The servers, on the process of each machine that looks after them."""
        mine = None
        if processes.is_first if settings.urls else processes.is_first_here:
            self.pool = ServerPool(spec, check, log_dir, processes.device)
            atexit.register(self.pool.close)  # a run that fails does not call `close`
            mine = self.pool.addresses
        here = "" if settings.urls else os.environ.get("GROUP_RANK", "0")
        each = dict(processes.gather([] if mine is None else [(here, mine)], f"the addresses of {name} servers"))
        self.addresses: Addresses = each[here]
        if self.pool is not None:
            self.pool.start()
        processes.wait(f"the {name} servers to start")
        num_servers = len(self.addresses.urls)
        urls = self.addresses.urls if spec.router_url is None else [spec.router_url]
        self.clients = [spec.server.client(url, self.addresses.token) for url in urls]
        self.router = Router(len(self.clients))
        sharing = processes.world_size if settings.urls else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.max_in_flight = -(-spec.max_running_requests * num_servers * 5 // (4 * sharing))
        """Requests of this process at the servers: a quarter more than they decode together, so that none idles."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.waits_s: list[float] = []
        self.sync_s, self.retried = 0.0, 0

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        """Continue `token_ids`, as `Engine.generate` says."""
        if not token_ids:
            raise ValueError("an empty prompt: there is no token to continue from")
        max_length = self.spec.max_length
        room = max_length - len(token_ids)
        if room <= 0:
            raise ValueError(f"a prompt of {len(token_ids)} tokens leaves no room: sequences end at {max_length}")
        if self.loop is not asyncio.get_running_loop():
            self.loop = asyncio.get_running_loop()
            self.places = asyncio.Semaphore(self.max_in_flight)
            # a new connection per request: none outlives the loop, and none is reused that a server has closed
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self.http = httpx.AsyncClient(limits=limits, trust_env=False)
        cut = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        came = time.perf_counter()
        async with self.places:
            self.waits_s.append(time.perf_counter() - came)
            return await self._sample(token_ids, cut)

    async def _sample(self, token_ids: list[int], sampling: Sampling) -> Completion:
        """Ask servers for one sample until one of them produces it. Raises `EngineFailed` after `TRIES` errors."""
        tokens, version = len(token_ids) + sampling.max_new_tokens, self.version
        back_at: dict[int, float] = {}
        """Time from which a server that failed is asked again."""
        begun = answered = time.monotonic()
        tries, problem = 0, ""
        while tries < TRIES:
            now = time.monotonic()
            avoid = frozenset(server for server, then in back_at.items() if now < then)
            if len(avoid) == len(self.clients):
                # twice a start: the failure has to be noticed, and weights to be loaded
                if now - answered > 2 * self.spec.settings.start_timeout_s:
                    break
                if self.addresses.notice.exists():
                    raise EngineFailed(self.addresses.notice.read_text())
                await asyncio.sleep(RETRY_S)
                continue
            server = self.router.choose(token_ids, tokens, avoid)
            try:
                answer = await self.clients[server].generate(
                    self.http, token_ids, sampling, self.spec.settings.request_timeout_s
                )
                if (completion := _completion(answer, version)) is not None:
                    return completion
                oldest = min(answer.versions, default=-1)
                problem, pause_s = f"{answer.finish} of weights {oldest}, with {version} to come", RETRY_S
            except ServerError as error:
                problem, tries = str(error), tries + error.counts
                pause_s = ERROR_RETRY_S if error.counts else RETRY_S
                if error.counts:
                    answered = time.monotonic()
            finally:
                self.router.release(server, tokens)
            self.retried += not back_at  # its first failure
            back_at[server] = time.monotonic() + pause_s
        raise EngineFailed(
            f"a request to the {self.spec.server.name} servers has failed {tries} times in "
            f"{time.monotonic() - begun:.0f} s, at last: {problem}; the logs of launched servers are in "
            f"{self.addresses.notice.parent}"
        )

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Serve these weights from now on (collective), and compare each server with the trainer on the probe.

        Raises `EngineFailed` on every process if a server fails or computes with other weights.
        """
        begun = time.perf_counter()
        problems: list[str] = []
        base: Iterator[tuple[str, Tensor]] | None = None
        sent: Iterator[tuple[str, Tensor]] = (pair for one in weights for pair in self.layout(*one).items())
        if self.apart is not None:
            base, sent = None if self.version >= 0 else self.apart.base(), self.apart.adapters()
            weights = chain(base or (), sent)
        if self.pool is not None:
            try:
                self.pool.send(sent, base)
            except EngineFailed as error:
                problems = [str(error)]
        for _ in weights:  # gathering is collective: each process draws what is left
            pass
        expected = self.check.trainer_logps(self.check.probe)
        if self.pool is not None and not problems:
            try:
                self.pool.load(version, expected)
            except EngineFailed as error:
                problems = [str(error)]
        if problems := self.processes.gather(problems, f"the {self.spec.server.name} servers to take the weights"):
            raise EngineFailed(problems[0])
        self.version = version
        self.router.forget()
        self.sync_s = time.perf_counter() - begun

    def metrics(self) -> dict[str, float]:
        """Return the metrics of docs/metrics.md; those of the servers only where this process owns the pool.

        Queue times at the client are those of this process alone.
        """
        metrics = {"engine/sync_s": self.sync_s, "engine/imbalance": self.router.imbalance()}
        metrics["engine/retried"] = float(self.retried)
        waits_s, self.waits_s, self.retried = self.waits_s, [], 0
        if self.pool is not None:
            metrics |= self.pool.metrics()
            mean_s = sum(waits_s) / len(waits_s) if waits_s else 0.0
            metrics["engine/queue_s"] = metrics.get("engine/queue_s", 0.0) + mean_s
        return metrics

    def sleep(self) -> None:
        """Suspend all requests; servers launched on GPUs free their memory until the next `load_weights`."""
        if self.pool is not None:
            self.pool.pause()

    def close(self) -> None:
        """Stop the servers that were launched; attached ones go on."""
        if self.pool is not None:
            self.pool.close()
            atexit.unregister(self.pool.close)


def _completion(answer: Answer, version: int) -> Completion | None:
    """Return the completion of an answer, or None if it was aborted or weights older than `version` sampled it."""
    if answer.finish not in ("stop", "length") or min(answer.versions, default=-1) < version:
        return None
    finish: Literal["stop", "length"] = "stop" if answer.finish == "stop" else "length"
    return Completion(answer.token_ids, answer.logps, finish, answer.versions)
