"""Servers as the engine: launched on this machine, or running ones that are attached to.

On each machine one process, the keeper, starts the servers, gives them new weights and starts them again when they die;
attached servers are given weights by the first process of the run. Every process sends its requests to all servers of
its machine, or to all that are attached.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import httpx
from torch import Tensor

from RL2.config.rollout import Servers, Transport
from RL2.engines.served.client import ServerError
from RL2.engines.served.router import Router
from RL2.engines.served.server import EngineFailed
from RL2.engines.served.server_pool import Addresses, Keeper
from RL2.engines.served.server_spec import Kind
from RL2.engines.served.weight_stream import make_stream
from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling

TRIES = 3
"""Of one request that a server answers with an error, or not in time. What finds no server at all is not counted."""
RETRY_S = 0.5
ERROR_RETRY_S = 5
"""After an error that the server itself told of: one whose engine has died takes 4 s to end."""
PROBE_LENGTH = 64


class ServedEngine:
    """`RL2.engines.base.Engine` over HTTP.

    A sample is made once or not at all: an answer that is lost, broken off or of other weights than the newest is
    thrown away and made again. Requests carry seeds, so it comes out the same.
    """

    def __init__(
        self,
        kind: Kind,
        settings: Servers,
        *,
        arguments: list[str],
        router_url: str | None = None,
        transport: Transport = "files",
        processes: Processes,
        trainer_logps: Callable[[list[int]], list[float]],
        vocab_size: int,
        max_length: int,
        max_running_requests: int,
        max_probe_gap: float,
        log_folder: Path,
    ) -> None:
        """Start the servers with the command line `arguments`, or attach to them (collective).

        A router at `router_url` gets the requests for samples in their place. `transport` is how weights reach them.

        `trainer_logps(token_ids)` are the trainer's log-probabilities at temperature 1 of each token but the first, by
        the weights that `load_weights` is being given (collective). `max_length` is the limit of a sequence in tokens,
        `max_probe_gap` what engine and trainer may be apart in the mean over a fixed probe, in nats. Raises
        `EngineFailed` if a server does not come up.
        """
        self.kind, self.settings, self.processes = kind, settings, processes
        self.trainer_logps, self.max_length = trainer_logps, max_length
        draw = random.Random(0)
        self.probe = [draw.randrange(vocab_size) for _ in range(min(PROBE_LENGTH, max_length - 1))]
        self.version = -1
        self.keeper: Keeper | None = None
        mine = None
        if processes.is_first if settings.urls else processes.is_first_here:
            stream = make_stream(transport, processes.device)
            self.keeper = Keeper(
                kind, settings, arguments, self.probe, max_probe_gap, log_folder, stream, processes.device
            )
            atexit.register(self.keeper.close)  # a run that fails closes nothing
            mine = self.keeper.addresses
        here = "" if settings.urls else os.environ.get("GROUP_RANK", "0")
        each = dict(processes.gather([] if mine is None else [(here, mine)], f"the addresses of {kind.name} servers"))
        self.addresses: Addresses = each[here]
        if self.keeper is not None:
            self.keeper.start()
        processes.wait(f"the {kind.name} servers to start")
        num_servers, urls = len(self.addresses.urls), self.addresses.urls if router_url is None else [router_url]
        self.clients = [kind.client(url, self.addresses.token) for url in urls]
        self.router = Router(len(self.clients))
        sharing = processes.world_size if settings.urls else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.max_in_flight = -(-max_running_requests * num_servers * 5 // (4 * sharing))
        """More wait here: a quarter beyond what is decoded together, so that no server runs dry."""
        self.loop: asyncio.AbstractEventLoop | None = None
        self.waits_s: list[float] = []
        self.sync_s, self.retried = 0.0, 0

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        if not token_ids:
            raise ValueError("an empty prompt: there is no token to go on from")
        room = self.max_length - len(token_ids)
        if room <= 0:
            raise ValueError(f"a prompt of {len(token_ids)} tokens leaves no room: sequences end at {self.max_length}")
        if self.loop is not asyncio.get_running_loop():
            self.loop = asyncio.get_running_loop()
            self.places = asyncio.Semaphore(self.max_in_flight)
            # a connection for each request: none is left when the loop ends, and none that a server has closed is used
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            self.http = httpx.AsyncClient(limits=limits, trust_env=False)
        cut = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        came = time.perf_counter()
        async with self.places:
            self.waits_s.append(time.perf_counter() - came)
            return await self._sample(token_ids, cut)

    async def _sample(self, token_ids: list[int], sampling: Sampling) -> Completion:
        tokens, version = len(token_ids) + sampling.max_new_tokens, self.version
        back_at: dict[int, float] = {}
        """When a server that has failed is asked again."""
        begun = answered = time.monotonic()
        tries, problem = 0, ""
        while tries < TRIES:
            now = time.monotonic()
            avoid = frozenset(server for server, then in back_at.items() if now < then)
            if len(avoid) == len(self.clients):
                # a start, and that it was noticed to be needed, and that weights were loaded
                if now - answered > 2 * self.settings.start_timeout_s:
                    break
                if self.addresses.notice.exists():
                    raise EngineFailed(self.addresses.notice.read_text())
                await asyncio.sleep(RETRY_S)
                continue
            server = self.router.choose(token_ids, tokens, avoid)
            try:
                answer = await self.clients[server].generate(
                    self.http, token_ids, sampling, self.settings.request_timeout_s
                )
                oldest = min(answer.versions, default=-1)
                if answer.finish in ("stop", "length") and oldest >= version:
                    finish: Literal["stop", "length"] = "stop" if answer.finish == "stop" else "length"
                    return Completion(answer.token_ids, answer.logps, finish, answer.versions)
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
            f"a request to the {self.kind.name} servers has failed {tries} times in {time.monotonic() - begun:.0f} s, "
            f"at last: {problem}; the logs of launched servers are in {self.addresses.notice.parent}"
        )

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """As the protocol says; then each server's log-probabilities of the probe have to be the trainer's.

        Raises `EngineFailed` on every process, naming the version, if they are not.
        """
        begun = time.perf_counter()
        problems: list[str] = []
        if self.keeper is None:
            for _ in weights:
                pass
        else:
            try:
                self.keeper.send(weights)
            except EngineFailed as error:
                for _ in weights:  # the others draw all, and it takes all of us
                    pass
                problems = [str(error)]
        expected = self.trainer_logps(self.probe)
        if self.keeper is not None and not problems:
            try:
                self.keeper.load(version, expected)
            except EngineFailed as error:
                problems = [str(error)]
        if problems := self.processes.gather(problems, f"the {self.kind.name} servers to take the weights"):
            raise EngineFailed(problems[0])
        self.version = version
        self.router.forget()
        self.sync_s = time.perf_counter() - begun

    def metrics(self) -> dict[str, float]:
        """See docs/metrics.md. On the first process; the others send requests too, and wait for themselves."""
        metrics = {"engine/sync_s": self.sync_s, "engine/imbalance": self.router.imbalance()}
        metrics["engine/retried"] = float(self.retried)
        waits_s, self.waits_s, self.retried = self.waits_s, [], 0
        if self.keeper is not None:
            metrics |= self.keeper.metrics()
            mean_s = sum(waits_s) / len(waits_s) if waits_s else 0.0
            metrics["engine/queue_s"] = metrics.get("engine/queue_s", 0.0) + mean_s
        return metrics

    def sleep(self) -> None:
        """Requests under way stand still. Servers launched on GPUs leave their memory to others meanwhile."""
        if self.keeper is not None:
            self.keeper.pause()

    def close(self) -> None:
        """End the servers that were launched; attached ones go on."""
        if self.keeper is not None:
            self.keeper.close()
            atexit.unregister(self.keeper.close)
