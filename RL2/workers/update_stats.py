"""How much of an update arrives in the stored weights: one that is below their resolution rounds to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from RL2.parallel.fsdp import local
from RL2.parallel.processes import Processes

SAMPLE = 2**16
"""Weights looked at in each tensor of each process, evenly spaced; all of a smaller one."""


class UpdateStats:
    """Compares the weights before and after a step of AdamW with what the step asked for."""

    def __init__(self, optimizer: torch.optim.AdamW, served_dtype: torch.dtype) -> None:
        """`served_dtype`: what the forward pass, and an engine, round the stored weights to."""
        self.optimizer, self.served_dtype = optimizer, served_dtype
        self.accounts: list[tuple[dict[str, Any], list[Tensor], Tensor]] = []
        """Of each group: its settings, those of its parameters that have a gradient, and samples of them before."""

    def open(self) -> None:
        """Before the step."""
        moving = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.optimizer.param_groups]
        self.accounts = [(group, parameters, _samples(parameters)) for group, parameters in moving if parameters]

    def close(self, processes: Processes) -> dict[str, float]:
        """After the step (collective): changed_share of the stored weights, and update_ratio, the norm of what they
        changed by over the norm of the requested update, which is left out if that is 0. Where weights are served in
        another dtype, served_changed_share says how many of them changed there.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=self.accounts[0][2].device)
        for group, parameters, old in self.accounts:
            new = _samples(parameters)
            served = new.to(self.served_dtype) != old.to(self.served_dtype)
            moved, asked = _precise(new) - _precise(old), self._requested(group, parameters, old)
            counts = (new != old).sum(), torch.ones_like(served).sum(), served.sum()
            squares = (x.square().sum(dtype=torch.float64) for x in (moved, asked))
            sums += torch.stack([*counts, *squares]) / _copies(parameters, processes)
        stored_dtype, self.accounts = old.dtype, []
        changed, number, served_changed, moved_sq, asked_sq = processes.sum(sums).tolist()
        metrics = {"changed_share": changed / number}
        if asked_sq > 0:
            metrics["update_ratio"] = (moved_sq / asked_sq) ** 0.5
        if self.served_dtype != stored_dtype:
            metrics["served_changed_share"] = served_changed / number
        return metrics

    def _requested(self, group: dict[str, Any], parameters: list[Tensor], old: Tensor) -> Tensor:
        """The step of AdamW, from its state after it (Loshchilov and Hutter 2019, algorithm 2)."""
        states = [self.optimizer.state[parameter] for parameter in parameters]
        steps = float(states[0]["step"])  # all have taken the same number
        mean, square = (_precise(_samples([state[name] for state in states])) for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        denominator = (square / (1 - beta2**steps)).sqrt() + group["eps"]
        decay = group["weight_decay"] * _precise(old)
        return -group["lr"] * (mean / (1 - beta1**steps) / denominator + decay)


def _copies(parameters: list[Tensor], processes: Processes) -> int:
    """On how many tensor-parallel processes the same weights are: norms are whole on each."""
    sharded = parameters[0]
    return processes.world_size // sharded.device_mesh.size() if isinstance(sharded, DTensor) else 1


def _samples(tensors: Sequence[Tensor]) -> Tensor:
    """Of each tensor of this process some elements, all laid end to end: few operations, whatever their number."""
    flat = [local(x).detach().reshape(-1) for x in tensors]
    return torch.cat([x[:: max(1, len(x) // SAMPLE)] for x in flat])


def _precise(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
