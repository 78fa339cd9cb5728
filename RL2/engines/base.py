"""The engine protocol: what a rollout and the loop call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from RL2.types import Completion, Sampling


class Engine(Protocol):
    """A sampler of tokens. It knows token ids and weights, but no text, rewards or training."""

    async def generate(self, token_ids: list[int], sampling: Sampling) -> Completion:
        """Continue `token_ids` by at least one token.

        Any number of requests may be pending; the engine decides how many it decodes at once. Raises an error, which
        stops the run, if it cannot serve the request.
        """
        ...

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Serve these weights from now on; pending requests continue with them.

        Collective: every rank calls it and exhausts the iterator, because each tensor may be gathered from all ranks
        when it is drawn.
        """
        ...

    def sleep(self) -> None:
        """Free the memory of weights and cache for training, until the next `load_weights`.

        Pending requests are suspended until then.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return metrics by name, counted since the last call, for the report of a step."""
        ...

    def close(self) -> None:
        """Release all resources; the engine cannot be used again."""
        ...
