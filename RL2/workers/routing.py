"""Metrics and losses of an update's routing, for models with experts.

Shapes: E experts, L routers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.config.model import Moe
from RL2.models.routing import Routers, RoutingSums
from RL2.parallel.processes import Processes

NAMES = {"aux_coef": "moe/balance_loss", "z_coef": "moe/z_loss"}
"""Metric of the loss that each key of `Moe` is a coefficient of."""


class RoutingTotals:
    """Sums of the decisions of routers over microbatches and processes."""

    def __init__(self, moe: Moe, tokens: int, processes: Processes, data: dist.ProcessGroup | None = None) -> None:
        """Start at 0; `tokens` is the number of all tokens of the sequences that train.

        `data` is the group with one process from each part of the data, None for all processes.
        """
        self.moe, self.all_tokens, self.processes, self.data = moe, tokens, processes, data
        self.load_LE = self.entropy_L = torch.zeros((), dtype=torch.float64)
        self.losses = torch.zeros(len(moe.terms), dtype=torch.float64)
        self.changed: Tensor | None = None

    def sums(self, routers: Routers) -> RoutingSums:
        """Return empty sums for a microbatch."""
        return RoutingSums(routers, with_losses=bool(self.moe.terms), follows=self.moe.follows)

    def add(self, seen: RoutingSums, counts: bool) -> Tensor:
        """Add a microbatch, and return its part of the loss of the update: coefficients times losses of routers.

        Without `counts` the microbatch ran only so that all processes take part in the same collectives.
        """
        factor = float(counts)
        self.load_LE = self.load_LE + factor * seen.load_LE.double().cpu()
        self.entropy_L = self.entropy_L + factor * seen.entropy_L.double().cpu()
        if seen.changed_L is not None:
            before = torch.zeros((), dtype=torch.float64) if self.changed is None else self.changed
            self.changed = before + factor * seen.changed_L.double().mean().cpu()
        if not self.moe.terms:
            return torch.zeros(())
        share = factor * seen.tokens / max(1, self.all_tokens)
        losses = {"aux_coef": seen.balance_loss, "z_coef": seen.z_loss}
        parts = torch.stack([share * losses[key]() for key in self.moe.terms])
        self.losses += parts.detach().double().cpu()
        return (parts * parts.new_tensor(list(self.moe.terms.values()))).sum()

    def metrics(self) -> dict[str, float]:
        """Return the metrics over all processes (collective); none if no sequence trained."""
        load_LE, entropy_L = self._total(self.load_LE), self._total(self.entropy_L)
        changed = {} if self.changed is None else {"moe/routes_changed": float(self._total(self.changed))}
        losses = dict(zip(self.moe.terms, self._total(self.losses).tolist(), strict=True))
        if not self.all_tokens:
            return {}
        share_LE = load_LE / load_LE.sum(-1, keepdim=True)
        return (
            {
                "moe/load_max": float(share_LE.max()) * load_LE.shape[1],
                "moe/routing_entropy": float(entropy_L.mean()) / self.all_tokens,
                "moe/unused_experts": float((load_LE == 0).double().mean()),
            }
            | {NAMES[key]: value for key, value in losses.items()}
            | {key: x / self.all_tokens for key, x in changed.items()}
        )

    def move_biases(self, routers: Routers) -> None:
        """Move each correction bias by `bias_rate` towards an even load, once `metrics` has summed the loads."""
        if not (self.moe.bias_rate and self.all_tokens):
            return
        for router, load_E in zip(routers.all, self.load_LE, strict=True):
            assert router.bias_E is not None
            router.bias_E.add_((load_E.mean() - load_E).sign().to(router.bias_E), alpha=self.moe.bias_rate)

    def _total(self, x: Tensor) -> Tensor:
        return self.processes.sum(x, self.data)
