"""How much of an update arrives in the stored weights: one that is below their resolution rounds to nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from RL2.parallel.processes import Processes

SAMPLE = 2**16
"""Weights looked at in each tensor of each process, evenly spaced; all of a smaller one."""


class Ledger:
    """Compares the weights before and after a step of AdamW with what the step asked for."""

    def __init__(self, optimizer: torch.optim.AdamW, served_dtype: torch.dtype) -> None:
        """`served_dtype`: what the forward pass, and an engine, round the stored weights to."""
        self.optimizer, self.served_dtype = optimizer, served_dtype
        self.before: list[Tensor] = []

    def open(self) -> None:
        """Before the step."""
        self.before = [_sample(p).clone() for group in self.optimizer.param_groups for p in group["params"]]

    def close(self, processes: Processes) -> dict[str, float]:
        """After the step (collective): changed_share of the stored weights, and update_ratio, the norm of what they
        changed by over the norm of the requested update, which is left out if that is 0. Where weights are served in
        another dtype, served_changed_share says how many of them changed there.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=self.before[0].device)
        before = iter(self.before)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                old, new = next(before), _sample(parameter)
                asked = _requested(self.optimizer.state[parameter], group, old)
                moved = new.double() - old.double()
                served = new.to(self.served_dtype) != old.to(self.served_dtype)
                counts = (new != old).sum(), torch.tensor(len(new), device=sums.device), served.sum()
                sums += torch.stack([*counts, moved.square().sum(), asked.square().sum()]).double()
        self.before = []
        changed, number, served_changed, moved_sq, asked_sq = processes.sum(sums).tolist()
        metrics = {"changed_share": changed / number}
        if asked_sq > 0:
            metrics["update_ratio"] = (moved_sq / asked_sq) ** 0.5
        if self.served_dtype != new.dtype:
            metrics["served_changed_share"] = served_changed / number
        return metrics


def _sample(x: Tensor) -> Tensor:
    flat = (x.to_local() if isinstance(x, DTensor) else x).detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)]


def _requested(state: dict[str, Tensor], group: dict[str, Any], old: Tensor) -> Tensor:
    """The step of AdamW in float64, from the optimizer's state after it (Loshchilov and Hutter 2019, algorithm 2)."""
    if not state:  # it had no gradient
        return torch.zeros_like(old, dtype=torch.float64)
    mean, square = (_sample(state[name]).double() for name in ("exp_avg", "exp_avg_sq"))
    beta1, beta2 = group["betas"]
    steps = float(state["step"])
    denominator = (square / (1 - beta2**steps)).sqrt() + group["eps"]
    decay = group["weight_decay"] * old.double()
    return -group["lr"] * (mean / (1 - beta1**steps) / denominator + decay)
