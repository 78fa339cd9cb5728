"""The default engine: continuous batching over a transformers causal LM in this process.

One step of the engine decodes one token for every running request and then admits waiting ones; each distinct prompt
runs once. A finished request leaves its row at once, and the last row takes its place. New weights send all running
requests back to the queue; on GPUs a full cache sends back some. Their cache is recomputed from the tokens so far.

A model with packed attention decodes requests of all lengths in one batch (`KVCache`). Any other model runs its own
forward, on padded batches (`LockstepCache`).

The event loop of `generate` serves the requests; the other methods may be called from another thread.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from RL2.engines.embedded.cache import PREFILL_TOKENS, Cache, Owners
from RL2.engines.embedded.dense import DenseCache
from RL2.engines.embedded.history import Trail
from RL2.engines.embedded.lockstep import OwnForward
from RL2.engines.embedded.packed import KVCache, PackedForward
from RL2.engines.embedded.prefixes import PrefixTree
from RL2.engines.embedded.sampling import sample, uniforms
from RL2.engines.embedded.speculation import MAX_DRAFT, Mode, Speculation
from RL2.engines.memory import bytes_per_position, free_bytes
from RL2.errors import UserError
from RL2.models.inspection import stored_buffers
from RL2.models.policy import positions
from RL2.ops.attention import is_packed
from RL2.types import Completion, Sampling

PREFIX_SHARE = 0.25
"""Share of the engine's memory that keys and values of ended requests may take."""
PAUSE_S = 0.001
"""Poll interval of a suspended engine, in seconds."""


class OutOfMemory(UserError, RuntimeError):
    """The KV cache of a single request exceeds the memory that the engine may use."""


class BrokenWeights(UserError, RuntimeError):
    """Probabilities of the model are not finite."""


@dataclass(eq=False)
class _Request:
    """A request and its tokens so far."""

    prompt: list[int]
    sampling: Sampling
    future: asyncio.Future[Completion]
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    """Recorded experts of the tokens that the model ran, in parts."""

    num_noted: int = 0
    """Number of tokens whose experts are recorded."""

    trail: Trail | None = None
    """Its place in the history from which drafts come."""

    def note(self, experts: Tensor) -> None:
        """Record the experts of the last tokens that the model ran, except where they are recorded already.

        A request that starts over keeps those with which its tokens were sampled.
        """
        self.experts.append(experts[self.num_noted - (self.length - len(experts)) :])
        self.num_noted = self.length

    @property
    def ids(self) -> list[int]:
        """Prompt and sampled tokens."""
        return self.prompt + self.tokens

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def limit(self) -> int:
        return len(self.prompt) + self.sampling.max_new_tokens


class _Gate:
    """A lock for steps that lets another thread in between two of them, and that can stay closed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held during a step and while the weights change."""
        self.is_wanted = False
        """True if another thread waits for the lock, which is not fair by itself."""
        self.is_closed = False
        """True if no step may begin."""

    @property
    def is_open(self) -> bool:
        """True if a step may begin now."""
        return not (self.is_wanted or self.is_closed)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Hold the lock as soon as the current step has ended."""
        self.is_wanted = True
        with self.lock:
            self.is_wanted = False
            yield


class EmbeddedEngine:
    """An `Engine` over a causal LM of this process.

    The model may be the actor's own; `load_weights` then copies nothing. `decode` turns token ids into text, for
    requests with stop strings.
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
        records_experts: bool = False,
        speculation: Mode = "off",
        reuses_prefixes: bool = False,
    ) -> None:
        """Serve `lm`; with `owns_weights` no other part uses it, so `sleep` may free its weights.

        `speculation` says where several tokens are guessed and verified by one pass. With `reuses_prefixes`, keys and
        values of sequences stay until the weights change, for later turns; not on GPUs or with sliding windows.

        With `records_experts`, completions have the experts that each router of a mixture of experts chose.

        `compiles` fuses kernels: on GPUs those of a layer, which a model that also trains must not do; on CPUs all of a
        decoding step.
        """
        self.lm, self.decode = lm, decode
        self.model: PackedForward | OwnForward = (
            PackedForward(lm, compiles, records_experts) if is_packed(lm) else OwnForward(lm, records_experts)
        )
        self.device = next(lm.parameters()).device
        self.shapes = {name: tensor.shape for name, tensor in self._stored().items()} if owns_weights else {}
        """Shapes of the weights, which `sleep` frees; empty if they are not this engine's alone."""
        # the time of this process's threads, which other programs disturb less; on GPUs they do not do the work
        self.clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self.speculation = Speculation(speculation, self.clock) if speculation != "off" and is_packed(lm) else None
        """Drafts of next tokens; None: each pass samples one token per request."""
        can_reuse = isinstance(self.model, PackedForward) and not self.model.windows and self.device.type == "cpu"
        can_reuse = can_reuse and not records_experts  # those of reused positions are not recorded again
        self.prefixes = PrefixTree() if reuses_prefixes and can_reuse else None
        self.max_running_requests, self.memory_share = max_running_requests, memory_share
        self.version = 0
        self.waiting: deque[_Request] = deque()
        self.running: list[_Request] = []
        self.cache: Cache | None = None
        """The cache while requests are pending."""
        self.driver: asyncio.Task[None] | None = None
        self.gate = _Gate()
        self.longest = 0
        """Maximum length of a request since the engine was idle, in tokens."""

    @property
    def max_length(self) -> int:
        """Maximum length of a sequence in tokens."""
        return positions(self.lm.config)

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        if not token_ids:
            raise ValueError("an empty prompt: there is no token to continue from")
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
                if name in self.shapes and own[name].shape != self.shapes[name]:  # `sleep` freed it
                    own[name].data = own[name].new_empty(self.shapes[name])
                if own[name].data_ptr() != weight.data_ptr():
                    own[name].copy_(weight)
                loaded.add(name)
            if missing := own.keys() - loaded:
                raise RuntimeError(f"weights of version {version} lack {', '.join(sorted(missing)[:3])}")
            self.version, self.gate.is_closed = version, False

    def _stored(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint of the model has, by name."""
        return dict(self.lm.named_parameters()) | stored_buffers(self.lm)

    def sleep(self) -> None:
        """Free the cache, and the weights too unless they are the actor's."""
        with self._between_steps():
            self.gate.is_closed = True
            if self.shapes:
                for parameter in self.lm.parameters():
                    parameter.data = parameter.new_empty(0)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """Hold the lock between two steps, with all running requests back in the queue."""
        with self.gate.between_steps():
            self._start_over()
            if self.prefixes is not None:  # they are of the old weights
                self.prefixes.clear()
            yield

    def _start_over(self) -> None:
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        self.cache = None

    def metrics(self) -> dict[str, float]:
        drafted = self.speculation.metrics() if self.speculation else {}
        return drafted | (self.prefixes.metrics() if self.prefixes else {})

    def close(self) -> None:
        if self.driver is not None:
            self.driver.cancel()
        self._drop()
        self.prefixes = None

    async def _drive(self) -> None:
        """Run steps until no request is left; other tasks run in between."""
        try:
            self.lm.eval()
            while self.waiting or self.running:
                if self.gate.is_open:
                    with self.gate.lock, torch.no_grad():
                        if not self.gate.is_closed:  # `sleep` may have been called while this waited for the lock
                            self.step()
                await asyncio.sleep(0 if self.gate.is_open else PAUSE_S)
            self._drop()  # frees the cache for the training step
        except Exception as error:  # fail every pending request, so that no caller waits for ever
            self._drop(error)

    def _drop(self, cause: BaseException | None = None) -> None:
        for request in (*self.waiting, *self.running):
            if not request.future.done():
                # one exception per request: a shared one would collect the tracebacks of all tasks
                error = type(cause) if isinstance(cause, UserError) else RuntimeError
                stopped = error(f"the engine stopped: {cause or 'it was closed'}")
                stopped.__cause__ = cause
                request.future.set_exception(stopped)
        self.waiting.clear()
        self.running.clear()
        self.cache, self.longest = None, 0

    def step(self) -> None:
        """Decode one token for every running request, then admit the waiting ones that fit."""
        if self.cache is None or not self.cache.max_rows(self.longest):  # it was sized for shorter requests
            self._start_over()
            self.cache = self._new_cache()
        self._leave(self.cache, [i for i, request in enumerate(self.running) if request.future.cancelled()])
        if self.running:
            self._decode(self.cache)
        self._admit(self.cache)

    def _new_cache(self) -> Cache:
        budget_bytes = self.memory_share * free_bytes(self.device)
        if isinstance(self.model, OwnForward):
            return self.model.new_cache(budget_bytes)
        if self.device.type == "cuda":
            from RL2.engines.embedded.paged import PagedCache  # needs Triton, which not every platform has

            return PagedCache(
                self.model,
                budget_bytes,
                bytes_per_position(self.lm.config, self.lm.dtype),
                max_rows=self.max_running_requests,
                longest=self.longest,
                max_length=self.max_length,
            )
        if self.prefixes is not None:
            budget_bytes += self.memory_share * self.prefixes.num_bytes
            self.prefixes.limit_bytes = PREFIX_SHARE * budget_bytes
            budget_bytes -= self.prefixes.limit_bytes
        return DenseCache(self.model, budget_bytes, MAX_DRAFT if self.speculation else 0, self.prefixes)

    def _admit(self, cache: Cache) -> None:
        if not self.waiting:
            return
        rows = self._max_rows(cache)
        room = rows - len(self.running)
        # a few large prefills cost less than many small ones, so wait until enough rows are free
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
        if not owners:  # no room until running requests have finished
            return
        held = [request.length - (row < first) for row, request in enumerate(self.running)]
        self._reserve(cache, held, keep=first)
        logits_PV = cache.prefill(owners)
        if isinstance(cache, KVCache):
            for key, sharing in owners.items():
                cache.keep(sharing[0], list(key))
        prompt_of = {row: p for p, sharing in enumerate(owners.values()) for row in sharing}
        admitted = list(range(first, len(self.running)))
        index = torch.tensor([prompt_of[row] for row in admitted], device=self.device)
        self._advance(cache, admitted, logits_PV[index], [[] for _ in admitted])

    def _decode(self, cache: Cache) -> None:
        drafts = self.speculation.drafts(self.running) if self.speculation else None
        begun = self.clock()
        guesses: list[list[int]] = drafts.tokens() if drafts else [[] for _ in self.running]
        lengths = [request.length + len(guess) for request, guess in zip(self.running, guesses, strict=True)]
        if drafts and any(guesses) and isinstance(cache, KVCache) and not cache.has_room(lengths):
            drafts.drop()
            guesses, lengths = [[] for _ in self.running], [request.length for request in self.running]
        self._reserve(cache, lengths, keep=len(self.running))
        requests = list(self.running)
        guesses = guesses[: len(requests)]
        positions = [request.length - 1 for request in requests]
        if any(guesses):
            assert isinstance(cache, KVCache)
            ids = [[request.tokens[-1], *guess] for request, guess in zip(requests, guesses, strict=True)]
            logits_TV = cache.verify(ids, positions)
        else:
            logits_TV = cache.decode([request.tokens[-1] for request in requests], positions)
        counts = self._advance(cache, list(range(len(requests))), logits_TV, guesses)
        if self.speculation:
            self.speculation.learn(requests, drafts, counts, self.clock() - begun)

    def _advance(self, cache: Cache, rows: list[int], logits_TV: Tensor, guesses: list[list[int]]) -> list[int]:
        """Draw the next token for each of `rows`, and more while they equal the guesses; remove finished requests.

        `logits_TV` are those after the last token of a row and after each guess. Returns the number of tokens per row.
        """
        requests = [self.running[i] for i in rows]
        drawn = [
            (request.sampling, len(request.tokens) + i)
            for request, guess in zip(requests, guesses, strict=True)
            for i in range(len(guess) + 1)
        ]
        ids, logps = sample(
            logits_TV,
            torch.tensor([p.temperature for p, _ in drawn]),
            torch.tensor([p.top_p for p, _ in drawn]),
            torch.tensor([p.top_k for p, _ in drawn]),
            torch.tensor([p.min_p for p, _ in drawn]),
            torch.from_numpy(uniforms([p.seed for p, _ in drawn], [place for _, place in drawn])),
        )
        tokens = list(zip(ids.tolist(), logps.tolist(), strict=True))
        finished, counts, begin = [], [], 0
        for i, request, guess in zip(rows, requests, guesses, strict=True):
            experts = cache.experts.get(i)
            before, end = len(request.tokens), begin + len(guess) + 1
            for j, ((token, logp), guessed) in enumerate(zip(tokens[begin:end], [*guess, None], strict=True)):
                if experts is not None:  # of a whole prompt, or of the token before each drawn one
                    request.note(experts[j : j + 1] if guess else experts)
                is_finished = self._add(request, token, logp)
                if is_finished or token != guessed:  # later guesses were made behind another token
                    break
            counts.append(len(request.tokens) - before)
            if is_finished:
                finished.append(i)
                if isinstance(cache, KVCache):
                    cache.keep(i, request.ids[:-1])  # the last token has not been run
            begin = end
        self._leave(cache, finished)
        return counts

    def _add(self, request: _Request, token: int, logp: float) -> bool:
        """Add a sampled token to a request; return whether it is the last one."""
        if not math.isfinite(logp):
            raise BrokenWeights(f"the log-probability of token {token} is {logp}: the weights are broken")
        request.tokens.append(token)
        request.logps.append(logp)
        request.versions.append(self.version)
        finish = self._finish(request)
        if finish is not None:
            if not request.future.done():
                experts = torch.cat(request.experts) if request.experts else None
                done = Completion(request.tokens, request.logps, finish, request.versions, experts)
                request.future.set_result(done)
            if self.speculation:
                self.speculation.keep(request)
        return finish is not None

    def _finish(self, request: _Request) -> Literal["stop", "length"] | None:
        sampling = request.sampling
        if request.tokens[-1] in sampling.stop_token_ids:
            return "stop"
        if sampling.stop and any(stop in self._tail(request) for stop in sampling.stop):
            return "stop"
        return "length" if len(request.tokens) == sampling.max_new_tokens else None

    def _tail(self, request: _Request) -> str:
        """Return the text of the last tokens, enough for the longest stop string: a token has at least one byte."""
        longest = max(len(stop.encode()) for stop in request.sampling.stop)
        return self.decode(request.tokens[-longest:])

    def _leave(self, cache: Cache, rows: list[int]) -> None:
        """Remove the requests at `rows`; the last running ones move to their rows."""
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
        """Make room for `lengths` tokens in the rows; rows without room go back to the queue."""
        wanted = min(self._max_rows(cache), len(self.running) + len(self.waiting))
        count = cache.reserve(lengths, keep, self.longest, wanted)
        back = list(range(count, len(self.running)))
        self.waiting.extendleft(reversed(self.running[count:]))
        self._leave(cache, back)

    def _max_rows(self, cache: Cache) -> int:
        """Return how many requests may run at once: what the cache can hold, up to `max_running_requests`."""
        fitting = cache.max_rows(self.longest)
        if fitting == 0:
            raise OutOfMemory(
                f"the KV cache of one request of {self.longest} tokens does not fit into {self.memory_share:.0%} of "
                "the free memory; raise rollout.gpu_memory_utilization or lower max_new_tokens"
            )
        return max(len(self.running), min(self.max_running_requests, fitting))
