"""Metrics of an update's routing, for models with experts.

Shapes: E experts, L routers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.models.routing import RoutingSums
from RL2.parallel.processes import Processes


class RoutingTotals:
    """Sums of the decisions of routers over microbatches and processes."""

    def __init__(self, processes: Processes, data: dist.ProcessGroup | None = None) -> None:
        """Start at 0; `data` is the group with one process from each part of the data, None for all processes."""
        self.processes, self.data = processes, data
        self.tokens = 0.0
        self.load_LE = self.entropy_L = torch.zeros((), dtype=torch.float64)

    def add(self, seen: RoutingSums, counts: bool) -> None:
        """Add a microbatch; without `counts` it ran only so that all processes take part in the same collectives."""
        factor = float(counts)
        self.tokens += factor * seen.tokens
        self.load_LE = self.load_LE + factor * seen.load_LE.double().cpu()
        self.entropy_L = self.entropy_L + factor * seen.entropy_L.double().cpu()

    def metrics(self) -> dict[str, float]:
        """Return the metrics over all processes (collective); none if no sequence trained."""
        load_LE, entropy_L = self._total(self.load_LE), self._total(self.entropy_L)
        tokens = float(self._total(torch.tensor(self.tokens, dtype=torch.float64)))
        if not tokens:
            return {}
        share_LE = load_LE / load_LE.sum(-1, keepdim=True)
        return {
            "moe/load_max": float(share_LE.max()) * load_LE.shape[1],
            "moe/routing_entropy": float(entropy_L.mean()) / tokens,
            "moe/unused_experts": float((load_LE == 0).double().mean()),
        }

    def _total(self, x: Tensor) -> Tensor:
        return self.processes.sum(x, self.data)
