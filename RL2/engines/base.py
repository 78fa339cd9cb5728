"""What a rollout needs of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from RL2.types import Completion, Sampling


class Engine(Protocol):
    """Samples tokens. It knows ids and weights only: nothing of text, rewards or training."""

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        """Continue `token_ids`, by one token at least.

        Any number of requests may be under way; the engine decides how many it decodes at once. A request that the
        engine cannot serve raises: that is the run's fault, and stops it.
        """
        ...

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Serve these weights from now on; requests that are under way go on with them.

        Collective: every rank calls it and draws the iterator to its end, because each tensor may be gathered from
        all ranks when it is drawn.
        """
        ...

    def sleep(self) -> None:
        """Leave the memory of weights and cache to training; the next `load_weights` takes it again.

        Requests that are under way stand still until then.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What it has to say about itself since the last time, by name: for the report of a step."""
        ...

    def close(self) -> None:
        """Give everything back; the engine is not used again."""
        ...
