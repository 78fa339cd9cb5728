"""vLLM servers as the engine: launched on this machine, or running ones that are attached to.

On each machine one process, the keeper, starts the servers, gives them new weights and starts them again when they die;
attached servers are given weights by the first process of the run. Every process sends its requests to all servers of
its machine, or to all that are attached.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import random
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig

from RL2.config import VLLM, Rollout
from RL2.engines.embedded.engine import free_bytes
from RL2.engines.vllm.client import Client, ServerError, gap
from RL2.engines.vllm.folders import SHARED_MEMORY, SHORT, OwnFolder
from RL2.engines.vllm.router import Router
from RL2.engines.vllm.server import POLL_S, EngineFailed, Server
from RL2.engines.vllm.weight_files import write
from RL2.parallel.processes import Processes
from RL2.types import Completion, Sampling

TRIES = 3
"""Of one request that a server answers with an error, or not in time. What finds no server at all is not counted."""
RETRY_S = 0.5
ERROR_RETRY_S = 5
"""After an error that the server itself told of: one whose engine has died takes 4 s to end."""
HEALTH_EVERY_S, HEALTH_TIMEOUT_S = 10, 60
PROBE_LENGTH = 64


@dataclass(frozen=True)
class Group:
    """The servers that a process sends requests to."""

    urls: list[str]
    token: str
    notice: Path
    """A file that the keeper writes when it gives the servers up: why."""


class VLLMEngine:
    """`RL2.engines.base.Engine` over HTTP.

    A sample is made once or not at all: an answer that is lost, broken off or of other weights than the newest is
    thrown away and made again. Requests carry seeds, so it comes out the same.
    """

    def __init__(
        self,
        settings: VLLM,
        *,
        arguments: list[str],
        processes: Processes,
        trainer_logps: Callable[[list[int]], list[float]],
        vocab_size: int,
        max_length: int,
        max_running_requests: int,
        max_probe_gap: float,
        log_folder: Path,
    ) -> None:
        """Start the servers with the command line `arguments`, or attach to them (collective).

        `trainer_logps(token_ids)` are the trainer's log-probabilities at temperature 1 of each token but the first, by
        the weights that `load_weights` is being given (collective). `max_length` is the limit of a sequence in tokens,
        `max_probe_gap` what engine and trainer may be apart in the mean over a fixed probe, in nats. Raises
        `EngineFailed` if a server does not come up.
        """
        self.settings, self.processes = settings, processes
        self.trainer_logps, self.max_length, self.max_probe_gap = trainer_logps, max_length, max_probe_gap
        draw = random.Random(0)
        self.probe = [draw.randrange(vocab_size) for _ in range(min(PROBE_LENGTH, max_length - 1))]
        self.version = -1
        self.keeper: Keeper | None = None
        group = None
        if processes.is_first if settings.urls else processes.is_first_here:
            self.keeper = Keeper(settings, arguments, self.probe, max_probe_gap, log_folder)
            atexit.register(self.keeper.close)  # a run that fails closes nothing
            group = self.keeper.group
        here = "" if settings.urls else os.environ.get("GROUP_RANK", "0")
        groups = dict(processes.gather([] if group is None else [(here, group)], "the addresses of vLLM servers"))
        self.group: Group = groups[here]
        if self.keeper is not None:
            self.keeper.start()
        processes.wait("the vLLM servers to start")
        self.clients = [Client(url, self.group.token) for url in self.group.urls]
        self.router = Router(len(self.clients))
        sharing = processes.world_size if settings.urls else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.max_in_flight = -(-max_running_requests * len(self.clients) * 5 // (4 * sharing))
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
        cut = Sampling(**{**vars(sampling), "max_new_tokens": min(sampling.max_new_tokens, room)})
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
                if self.group.notice.exists():
                    raise EngineFailed(self.group.notice.read_text())
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
            f"a request to the vLLM servers has failed {tries} times in {time.monotonic() - begun:.0f} s, at last: "
            f"{problem}; the logs of launched servers are in {self.group.notice.parent}"
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
                files = self.keeper.write(weights)
            except EngineFailed as error:
                for _ in weights:  # the others draw all, and it takes all of us
                    pass
                problems = [str(error)]
        expected = self.trainer_logps(self.probe)
        if self.keeper is not None and not problems:
            try:
                self.keeper.load(files, version, expected)
            except EngineFailed as error:
                problems = [str(error)]
        if problems := self.processes.gather(problems, "the vLLM servers to take the weights"):
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
        """Requests under way stand still. A server keeps its memory: on a CPU it cannot do otherwise."""
        if self.keeper is not None:
            self.keeper.pause()

    def close(self) -> None:
        """End the servers that were launched; attached ones go on."""
        if self.keeper is not None:
            self.keeper.close()
            atexit.unregister(self.keeper.close)


class Keeper:
    """Starts the servers, gives them weights, starts dead ones again."""

    def __init__(
        self, settings: VLLM, arguments: list[str], probe: list[int], max_probe_gap: float, log_folder: Path
    ) -> None:
        self.settings, self.probe, self.max_probe_gap = settings, probe, max_probe_gap
        self.temporary = OwnFolder(SHORT, f"rl2-vllm-{os.getuid()}-")
        if settings.sync_dir is None:
            parent = SHARED_MEMORY if SHARED_MEMORY.is_dir() else SHORT
            self.shared: OwnFolder | None = OwnFolder(parent, f"rl2-weights-{os.getuid()}-")
            self.folder = self.shared.path
        else:
            self.shared = None
            Path(settings.sync_dir).mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="rl2-weights-", dir=settings.sync_dir)).resolve()
        token = os.environ.get("VLLM_API_KEY", "") if settings.urls else secrets.token_urlsafe(32)
        name = "vllm" if os.environ.get("GROUP_RANK", "0") == "0" else f"vllm-node{os.environ['GROUP_RANK']}"
        self.servers = [
            Server(
                settings.python,
                arguments,
                settings.env,
                token,
                name=f"vLLM server {i}",
                log=log_folder / f"{name}-{i}.log",
                folder=self.temporary.path / str(i),
            )
            for i in range(0 if settings.urls else settings.num_servers)
        ]
        self.clients = [Client(url, token) for url in settings.urls] or [server.client for server in self.servers]
        self.group = Group([client.url for client in self.clients], token, log_folder / f"{name}-given-up.txt")
        self.lock = threading.Lock()
        """Held while servers start or take weights."""
        self.closing = threading.Event()
        self.watch = threading.Thread(target=self._watch, name="vllm-keeper", daemon=True)
        self.files: list[str] = []
        self.version, self.expected = -1, [0.0]
        self.writes = self.restarts = 0
        self.gaps: dict[int, float] = {}
        """Of the last comparison with each server, in nats."""
        self.queued = [(0.0, 0)] * len(self.clients)

    def start(self) -> None:
        """Raises `EngineFailed` if a server does not come up."""
        self.group.notice.unlink(missing_ok=True)
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait_until_healthy(self.settings.start_timeout_s)
        for client in self.clients:
            try:
                client.use_folder(str(self.folder))
            except (ServerError, ValueError) as error:
                raise EngineFailed(f"the vLLM server at {client.url} takes no weights: {error}") from error
        if self.servers:
            self.watch.start()

    def write(self, weights: Iterator[tuple[str, Tensor]]) -> list[str]:
        """Files of the weights that stay until the next ones are in place: a server that starts again needs them."""
        self.writes += 1
        try:
            return write(weights, self.folder, f"{self.writes}", self.settings.bucket_mib * 2**20)
        except (OSError, SafetensorError) as error:
            raise EngineFailed(
                f"the weights for the vLLM servers could not be written: {error}; "
                f"rollout.vllm.sync_dir chooses another place than {self.folder.parent}"
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
            for file in old:
                (self.folder / file).unlink()

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
                f"weights of version {self.version}: the vLLM server at {self.clients[i].url} computes with others "
                f"than the trainer. Over a probe of {len(self.probe)} tokens their log-probabilities are {apart:g} "
                f"nats apart in the mean, more than {self.max_probe_gap:g} (rollout.vllm.max_probe_gap)"
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
                            self.group.notice.write_text(str(error))
                        return
            if ask:
                asked = time.monotonic()

    def _restart(self, i: int, problem: str) -> None:
        """Raises `EngineFailed` if that was once too often, or it does not work."""
        server = self.servers[i]
        last_words = server.last_words
        server.stop()
        if self.restarts == self.settings.max_restarts:
            raise EngineFailed(
                f"{server.name}: {problem}, after {self.restarts} restarts (rollout.vllm.max_restarts); {last_words}"
            )
        if self.closing.is_set():
            raise EngineFailed("closed")
        self.restarts += 1
        server.start()
        server.wait_until_healthy(self.settings.start_timeout_s)
        try:
            server.client.use_folder(str(self.folder))
        except (ServerError, ValueError) as error:
            raise EngineFailed(f"{server.name}: {error}") from error
        if self.files and (problem := self._give(i)):
            raise EngineFailed(f"{server.name}: {problem}; {server.last_words}")

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


def server_arguments(rollout: Rollout, model: PretrainedConfig, dtype: torch.dtype, max_length: int) -> list[str]:
    """The command line of a server for sequences of up to `max_length` tokens, but for its address."""
    settings = rollout.vllm
    arguments = {
        "model": rollout.model_name,
        "dtype": str(dtype).removeprefix("torch."),
        "max-model-len": max_length,
        "max-num-seqs": rollout.max_running_requests,
        # a sync brings the weights, and one that does not would show at once
        "load-format": "dummy",
        "generation-config": "vllm",  # not the model's, which would set a temperature of its own
        "logprobs-mode": "processed_logprobs",  # after temperature, top_p and top_k
        "weight-transfer-config": json.dumps({"backend": "rl2_files"}),
        "worker-extension-cls": "rl2_plugin.WorkerExtension",
        "middleware": "rl2_plugin.TokenRequired",
    }
    if torch.cuda.is_available():
        arguments["gpu-memory-utilization"] = rollout.gpu_memory_utilization
    else:
        arguments["distributed-executor-backend"] = "uni"
    if settings.kv_cache_mib is not None:
        arguments["kv-cache-memory-bytes"] = settings.kv_cache_mib * 2**20
    elif not torch.cuda.is_available():
        wanted = _kv_cache_bytes(rollout.max_running_requests, model, dtype, max_length)
        room = rollout.gpu_memory_utilization * free_bytes(torch.device("cpu")) / settings.num_servers
        arguments["kv-cache-memory-bytes"] = min(wanted, int(room))
    flags = ["--enable-scale-out", "--disable-uvicorn-access-log"]
    flags += [] if torch.cuda.is_available() else ["--enforce-eager"]
    return [*flags, *(str(x) for key, value in arguments.items() for x in (f"--{key}", value)), *settings.args]


CPU_BLOCK = 128
"""Positions that vLLM's KV cache is cut into on CPUs."""


def _kv_cache_bytes(num_sequences: int, model: PretrainedConfig, dtype: torch.dtype, max_length: int) -> int:
    size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    per_position = 2 * model.num_hidden_layers * model.num_key_value_heads * size * dtype.itemsize
    blocks = num_sequences * -(-max_length // CPU_BLOCK) + 2
    return blocks * CPU_BLOCK * per_position
