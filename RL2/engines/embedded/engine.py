"""The default engine: samples in this process from a transformers causal LM, with continuous batching.

One step of the engine decodes one token for every running request and then admits waiting ones: their prompts run
packed, each distinct prompt once, a long one in pieces. Finished requests leave their row at once; the last row takes
its place. New weights send the running requests back to wait, and so does, on GPUs, a cache that is full: keys and
values are computed again, from what there is by then.

Requests are served by the event loop of `generate`; the other methods may be called from another thread.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from RL2.engines.embedded.cache import Cache, Piece, Step, bytes_per_position
from RL2.engines.embedded.compiled import CompiledStep
from RL2.engines.embedded.dense import DenseCache
from RL2.engines.embedded.sampling import sample, uniforms
from RL2.errors import UserError
from RL2.models.inspection import stored_buffers
from RL2.models.packed import backbone, layers
from RL2.models.policy import head, positions
from RL2.ops.attention import IN_GRAPH, Attend
from RL2.types import Completion, Sampling

PREFILL_TOKENS, CPU_PASS_TOKENS = 8192, 1024
"""Prompt tokens that are admitted between two steps, and that go through the model in one pass on a CPU."""
PAUSE_S = 0.001
"""How often an engine that stands still looks whether it may go on."""


Owners = dict[tuple[int, ...], list[int]]
"""Prompts, and the rows that begin with each."""


class OutOfMemory(UserError, RuntimeError):
    """Not even one request fits into the memory that the engine may take."""


class BrokenWeights(UserError, RuntimeError):
    """The model's probabilities are not numbers."""


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    sampling: Sampling
    future: asyncio.Future[Completion]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """All tokens that there are of it."""
        return self.prompt + self.tokens

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.sampling.max_new_tokens


class EmbeddedEngine:
    """An `Engine` over a causal LM of this process.

    The model may be the actor's own: `load_weights` then finds that every tensor is already in place and copies
    nothing. `decode` turns token ids into text; it is only asked for requests with stop strings.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        decode: Callable[[list[int]], str],
        max_running_requests: int,
        memory_share: float,
        owns_weights: bool = False,
        compiles: bool = False,
    ) -> None:
        """`owns_weights`: `lm` is this engine's alone, so `sleep` may let go of its weights.

        `compiles` joins small kernels: on GPUs those of a layer, which is not for a model that trains, too; on CPUs all
        of a decoding step.
        """
        self.lm, self.decode, self.owns_weights = lm, decode, owns_weights
        self.shapes = {name: tensor.shape for name, tensor in self._stored().items()}
        self.max_running_requests, self.memory_share = max_running_requests, memory_share
        self.device = next(lm.parameters()).device
        self.max_length = positions(lm.config)
        self.version = 0
        self.prefilled = 0
        """Positions that prefills have computed."""
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []
        self.cache: Cache | None = None
        """While requests are under way."""
        self.driver: asyncio.Task[None] | None = None
        self.lock = threading.Lock()
        """Held during a step, and while the weights change."""
        self.longest = 0
        """Tokens that a request may come to, of those since the engine was idle."""
        self.is_asleep = False
        self.is_wanted = False
        """Somebody waits for the lock, which is not a fair one."""
        self.decoding: Step = self._logits
        if compiles and self.device.type == "cuda":
            for layer in layers(lm):
                layer.compile(dynamic=True)
        elif compiles:
            lm.set_attn_implementation(IN_GRAPH)
            self.decoding = CompiledStep(self._logits)

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        if not token_ids:
            raise ValueError("an empty prompt: there is no token to go on from")
        if len(token_ids) >= self.max_length:
            raise ValueError(f"a prompt of {len(token_ids)} tokens leaves no room: the model ends at {self.max_length}")
        room = self.max_length - len(token_ids)
        if sampling.max_new_tokens > room:
            sampling = replace(sampling, max_new_tokens=room)
        request = _Request(token_ids, sampling, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        self.longest = max(self.longest, request.limit)
        if self.driver is None or self.driver.done():
            self.driver = asyncio.create_task(self._drive())
        return await request.future

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        own = self._stored()
        loaded = set()
        with self._between_steps(), torch.no_grad():
            for name, weight in weights:
                if own[name].shape != self.shapes[name]:  # it has slept
                    own[name].data = own[name].new_empty(self.shapes[name])
                if own[name].data_ptr() != weight.data_ptr():
                    own[name].copy_(weight)
                loaded.add(name)
            if missing := own.keys() - loaded:
                raise RuntimeError(f"weights of version {version} lack {', '.join(sorted(missing)[:3])}")
            self.version, self.is_asleep = version, False

    def _stored(self) -> dict[str, Tensor]:
        """Return what a checkpoint of the model has, by name."""
        return dict(self.lm.named_parameters()) | stored_buffers(self.lm)

    def sleep(self) -> None:
        """The cache goes, and the weights too, unless they are the actor's own."""
        with self._between_steps():
            self.is_asleep = True
            if self.owns_weights:
                for parameter in self.lm.parameters():
                    parameter.data = parameter.new_empty(0)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """No step is at work, and running requests have gone back to wait, in their order."""
        self.is_wanted = True
        with self.lock:
            self.is_wanted = False
            self._start_over()
            yield

    def _start_over(self) -> None:
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        self.cache = None

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        if self.driver is not None:
            self.driver.cancel()
        self._drop()

    async def _drive(self) -> None:
        """Steps until nothing is left to do, letting other tasks run in between."""
        try:
            self.lm.eval()
            while self.waiting or self.running:
                if not (self.is_wanted or self.is_asleep):
                    with self.lock, torch.no_grad():
                        if not self.is_asleep:  # it may have fallen asleep while the lock was waited for
                            self.step()
                await asyncio.sleep(PAUSE_S if self.is_wanted or self.is_asleep else 0)
            self._drop()  # of the cache: its memory is the training step's now
        except Exception as error:  # every caller is told; none is left waiting
            self._drop(error)

    def _drop(self, cause: BaseException | None = None) -> None:
        for request in (*self.waiting, *self.running):
            if not request.future.done():
                # an exception of its own for each: one that is raised in many tasks gathers the traces of all
                kind = type(cause) if isinstance(cause, UserError) else RuntimeError
                stopped = kind(f"the engine stopped: {cause or 'it was closed'}")
                stopped.__cause__ = cause
                request.future.set_exception(stopped)
        self.waiting.clear()
        self.running.clear()
        self.cache, self.longest = None, 0

    def step(self) -> None:
        """One token for every running request, then admit what fits."""
        if self.cache is None or not self.cache.max_rows(self.longest):  # made when only shorter ones were known
            self._start_over()
            self.cache = self._new_cache()
        self._leave(self.cache, [i for i, request in enumerate(self.running) if request.future.cancelled()])
        if self.running:
            self._decode(self.cache)
        self._admit(self.cache)

    def _new_cache(self) -> Cache:
        budget_bytes = self.memory_share * free_bytes(self.device)
        per_position = bytes_per_position(self.lm.config, self.lm.dtype)
        if self.device.type == "cuda":
            from RL2.engines.embedded.paged import PagedCache  # Triton is not everywhere

            return PagedCache(
                budget_bytes,
                per_position,
                self.device,
                max_rows=self.max_running_requests,
                longest=self.longest,
                max_length=self.max_length,
            )
        return DenseCache(budget_bytes, per_position, self.device)

    def _admit(self, cache: Cache) -> None:
        if not self.waiting:
            return
        rows = self._max_rows(cache)
        room = rows - len(self.running)
        # a few large prefills cost less than many small ones, so a trickle of free rows waits until it is worth it
        if room < max(1, min(len(self.waiting), rows // 8)):
            return
        owners: Owners = {}
        tokens, first = 0, len(self.running)
        while self.waiting and len(self.running) < rows:
            key, row = tuple(self.waiting[0].ids), len(self.running)
            new = 0 if key in owners else len(key)
            if owners and tokens + new > PREFILL_TOKENS:
                break
            if not cache.add(row, len(key), owners[key][0] if key in owners else None):
                break
            owners.setdefault(key, []).append(row)
            self.running.append(self.waiting.popleft())
            tokens += new
        if not owners:  # until some that run have left
            return
        held = [request.length - (row < first) for row, request in enumerate(self.running)]
        self._reserve(cache, held, keep=first)
        logits_PV = torch.cat([self._prefill_pass(cache, some) for some in self._passes(owners)])
        prompt_of = {row: p for p, sharing in enumerate(owners.values()) for row in sharing}
        admitted = list(range(first, len(self.running)))
        self._advance(
            cache, admitted, logits_PV[torch.tensor([prompt_of[row] for row in admitted], device=self.device)]
        )

    def _passes(self, owners: Owners) -> Iterator[Owners]:
        """Prompts that share a forward pass: on a CPU few, so that what they make stays in its cache."""
        most = CPU_PASS_TOKENS if self.device.type == "cpu" else PREFILL_TOKENS
        some: Owners = {}
        tokens = 0
        for prompt, rows in owners.items():
            if some and tokens + len(prompt) > most:
                yield some
                some, tokens = {}, 0
            some[prompt] = rows
            tokens += len(prompt)
        yield some

    def _prefill_pass(self, cache: Cache, owners: Owners) -> Tensor:
        """Logits after each prompt, in one pass, unless a prompt is too long for that: then it is alone."""
        for start in range(0, max(map(len, owners)), PREFILL_TOKENS):
            pieces = [Piece(of, start, min(len(key), start + PREFILL_TOKENS)) for key, of in owners.items()]
            logits_PV = self._prefill(cache, [key[start : start + PREFILL_TOKENS] for key in owners], pieces)
        return logits_PV

    def _prefill(self, cache: Cache, prompts: list[tuple[int, ...]], pieces: list[Piece]) -> Tensor:
        """Logits after each piece."""
        ids = torch.tensor([i for prompt in prompts for i in prompt], device=self.device)
        positions = torch.cat([torch.arange(piece.start, piece.end, device=self.device) for piece in pieces])
        last = torch.tensor([len(prompt) for prompt in prompts], device=self.device).cumsum(0) - 1
        self.prefilled += len(ids)
        hidden_TD = self._forward(ids, positions, cache.prefill(pieces))
        return head(self.lm)(hidden_TD[last])

    def _decode(self, cache: Cache) -> None:
        self._reserve(cache, [request.length for request in self.running], keep=len(self.running))
        ids = [request.tokens[-1] for request in self.running]
        positions = [request.length - 1 for request in self.running]
        self._advance(cache, list(range(len(ids))), cache.decode(self.decoding, ids, positions))

    def _logits(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        return head(self.lm)(self._forward(ids, positions, attend))

    def _forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        out = backbone(self.lm)(input_ids=ids[None], position_ids=positions[None], use_cache=False, attend=attend)
        return out.last_hidden_state[0]

    def _advance(self, cache: Cache, rows: list[int], logits_RV: Tensor) -> None:
        """Draw a token for each of `rows`, and let the finished ones go."""
        requests = [self.running[i] for i in rows]
        params = [request.sampling for request in requests]
        ids, logps = sample(
            logits_RV,
            torch.tensor([p.temperature for p in params]),
            torch.tensor([p.top_p for p in params]),
            torch.tensor([p.top_k for p in params]),
            torch.from_numpy(uniforms([p.seed for p in params], [len(r.tokens) for r in requests])),
        )
        finished = []
        for i, request, token, logp in zip(rows, requests, ids.tolist(), logps.tolist(), strict=True):
            if not math.isfinite(logp):
                raise BrokenWeights(f"the log-probability of token {token} is {logp}: the weights are broken")
            request.tokens.append(token)
            request.logps.append(logp)
            request.versions.append(self.version)
            if (finish := self._finish(request)) is not None:
                if not request.future.done():
                    done = Completion(request.tokens, request.logps, finish, request.versions)
                    request.future.set_result(done)
                finished.append(i)
        self._leave(cache, finished)

    def _finish(self, request: _Request) -> Literal["stop", "length"] | None:
        sampling = request.sampling
        if request.tokens[-1] in sampling.stop_token_ids:
            return "stop"
        if sampling.stop and any(stop in self._tail(request) for stop in sampling.stop):
            return "stop"
        return "length" if len(request.tokens) == sampling.max_new_tokens else None

    def _tail(self, request: _Request) -> str:
        """Text of the newest tokens, enough for the longest stop string: every token is at least one byte of UTF-8."""
        longest = max(len(stop.encode()) for stop in request.sampling.stop)
        return self.decode(request.tokens[-longest:])

    def _leave(self, cache: Cache, rows: list[int]) -> None:
        """Requests at `rows` go; the last running ones take their rows."""
        if not rows:
            return
        gone = set(rows)
        count = len(self.running) - len(gone)
        movers = [i for i in range(count, len(self.running)) if i not in gone]
        holes = [i for i in rows if i < count]
        cache.leave(rows, movers, holes, max((self.running[i].length for i in movers), default=0))
        for source, target in zip(movers, holes, strict=True):
            self.running[target] = self.running[source]
        del self.running[count:]

    def _reserve(self, cache: Cache, lengths: list[int], keep: int) -> None:
        """Room for what the rows hold after the coming pass, the first `keep` before it too; or they wait once more."""
        wanted = min(self._max_rows(cache), len(self.running) + len(self.waiting))
        count = cache.reserve(lengths, keep, self.longest, wanted)
        back = list(range(count, len(self.running)))
        self.waiting.extendleft(reversed(self.running[count:]))
        self._leave(cache, back)

    def _max_rows(self, cache: Cache) -> int:
        """Requests that may run at once: as many as the cache can hold, up to `max_running_requests`."""
        fitting = cache.max_rows(self.longest)
        if fitting == 0:
            raise OutOfMemory(
                f"the KV cache of one request of {self.longest} tokens does not fit into {self.memory_share:.0%} of "
                "the free memory; raise rollout.gpu_memory_utilization or lower max_new_tokens"
            )
        return max(len(self.running), min(self.max_running_requests, fitting))


def free_bytes(device: torch.device) -> float:
    """Memory that is free now: of the GPU, or this process' share of what the machine could give."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux: half of what there is
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available / here
