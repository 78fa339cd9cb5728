"""An engine without a model, for tests: its responses are given by a function."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from torch import Tensor

from RL2.types import Completion, Sampling

Reply = Callable[[list[int], Sampling], list[int]]


def _minus_one(token_ids: list[int]) -> list[float]:
    return [-1.0] * len(token_ids)


class ScriptedEngine:
    """An `Engine` whose tokens are `reply(token_ids, sampling)` and whose log-probabilities are `logps(tokens)`.

    A reply ends like a sampled one: after the first of `stop_token_ids`, or at `max_new_tokens`. A shorter one counts
    as stopped.
    """

    def __init__(self, reply: Reply, logps: Callable[[list[int]], list[float]] = _minus_one) -> None:
        self._reply = reply
        self._logps = logps
        self.requests: list[tuple[list[int], Sampling]] = []
        self.weights: dict[str, Tensor] = {}
        self.version = 0
        self.closed = False

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        self.requests.append((list(token_ids), sampling))
        await asyncio.sleep(0)  # let requests overlap, as in a real engine
        reply = self._reply(token_ids, sampling)
        stops = [i for i, token in enumerate(reply) if token in sampling.stop_token_ids]
        end = stops[0] + 1 if stops else len(reply)
        cut = reply[: min(end, sampling.max_new_tokens)]
        by_itself = end < sampling.max_new_tokens or (bool(stops) and end == sampling.max_new_tokens)
        return Completion(cut, self._logps(cut), "stop" if by_itself else "length", [self.version] * len(cut))

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        self.weights = dict(weights)
        self.version = version

    def sleep(self) -> None:
        self.weights = {}

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.closed = True
