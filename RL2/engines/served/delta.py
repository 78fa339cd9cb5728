"""The trainer's side of weights that are sent as changes: what the servers have, and what differs from it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from RL2.engines.served.wire.rl2_delta import change, checksums

CPU = torch.device("cpu")


class SentWeights:
    """The weights that were sent last, in host memory."""

    def __init__(self, run: str) -> None:
        """Start with nothing sent; `run` names these weights among those of other runs."""
        self.run = run
        self.weights: dict[str, Tensor] = {}
        self.checksums: dict[str, int] = {}
        """Checksum of each weight; empty unless the last `changes` ended."""
        self.number = itertools.count(1)
        self.follows = self.label = ""
        """Labels of the weights before the last changes, '' if these are whole, and after them."""
        self.sent_bytes = 0

    def changes(self, weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that lead from the weights sent last to `weights`, and keep these.

        If nothing was sent, or not to the end, all are whole.
        """
        if not self.checksums:
            self.weights = {}
        self.follows, self.checksums, self.sent_bytes = self.label if self.weights else "", {}, 0
        self.label = f"{self.run}/{next(self.number)}"
        for name, weight in weights:
            new = weight.detach().to(CPU).contiguous()
            if name not in self.weights:
                self.weights[name] = new.clone()  # the trainer's own tensor changes in place
                sent = {name: new}
            else:
                sent = change(name, self.weights[name], new)
                self.weights[name].copy_(new)
            self.sent_bytes += sum(tensor.nbytes for tensor in sent.values())
            yield from sent.items()
        self.checksums = checksums(self.weights)

    @property
    def sent_share(self) -> float:
        """Bytes of the last changes over those of all weights."""
        return self.sent_bytes / max(1, sum(weight.nbytes for weight in self.weights.values()))
