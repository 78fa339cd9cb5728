"""AdamW, its learning-rate schedule, and statistics of its updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from RL2.config.model import Trainable
from RL2.parallel.fsdp import by_mesh, clip_grad_norm, local
from RL2.parallel.processes import Processes

SAMPLE = 2**16
"""Weights compared in each tensor of each process, evenly spaced; all of a smaller tensor."""


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float = 1e-6,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """Return AdamW over the parameters that train; only matrices have weight decay."""
    return torch.optim.AdamW(parameter_groups(parameters, weight_decay), lr=lr, betas=betas, eps=eps)


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters that train in groups for an optimizer; only matrices have weight decay."""
    trained = [p for p in parameters if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    return [
        *({"params": group, "weight_decay": weight_decay} for group in by_mesh(matrices)),
        *({"params": group, "weight_decay": 0.0} for group in by_mesh(vectors)),
    ]


def clipped_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    max_grad_norm: float,
    check: Callable[[float], None],
) -> float:
    """Scale the gradients to a norm of at most `max_grad_norm`, take a step of `optimizer`, and forget the gradients.

    Returns the norm before scaling (collective). `check` gets it before the step; it raises an error to prevent the
    step.
    """
    grad_norm = clip_grad_norm(parameters, max_grad_norm)
    check(grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def move_state(optimizer: torch.optim.AdamW, device: torch.device) -> None:
    """Move the moments of AdamW and Muon to `device`."""
    for state in optimizer.state.values():
        for name in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer"}:
            state[name] = state[name].to(device)


def schedule(config: Trainable, step: int, total: int) -> float:
    """Return the factor of the learning rate at optimizer step `step` (from 0) of `total`.

    After the warm-up it decays from 1 to min_lr / lr.
    """
    warmup = round(config.used_warmup_ratio * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.scheduler == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if config.scheduler == "wsd":
        left = min(1.0, (total - step) / max(1.0, config.decay_ratio * total))
    else:
        left = 1 - progress if config.scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    floor = config.min_lr / config.lr if config.min_lr else 0.0
    return floor + (1 - floor) * left


class UpdateStats:
    """Comparison of the change of the stored weights in a step of AdamW with the change that it computed.

    A change below the resolution of the stored dtype rounds to nothing.
    """

    def __init__(self, optimizer: torch.optim.AdamW, served_dtype: torch.dtype) -> None:
        """Watch `optimizer`; the forward pass and the engine round stored weights to `served_dtype`."""
        self.optimizer, self.served_dtype = optimizer, served_dtype
        self.before: list[tuple[dict[str, Any], list[Tensor], Tensor]] = []
        """Each parameter group, its parameters with a gradient, and samples of them before the step."""

    def open(self) -> None:
        """Sample the weights before the step."""
        moving = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.optimizer.param_groups]
        self.before = [(group, parameters, _samples(parameters)) for group, parameters in moving if parameters]

    def close(self, processes: Processes) -> dict[str, float]:
        """Compare the weights after the step, and return the metrics (collective).

        `changed_share` is the share of stored weights that changed. `update_ratio` is the norm of their change over the
        norm of the computed update, left out if that is 0; matrices of Muon are not in it. `served_changed_share` is
        the share that changed in the dtype of the forward pass, if that is another one.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=self.before[0][2].device)
        for group, parameters, old in self.before:
            new = _samples(parameters)
            served = new.to(self.served_dtype) != old.to(self.served_dtype)
            counts = (new != old).sum(), torch.ones_like(served).sum(), served.sum()
            squares = [sums.new_zeros(())] * 2
            if not group.get("muon"):  # whose update does not follow from its state
                moved, asked = _precise(new) - _precise(old), self._requested(group, parameters, old)
                squares = [x.square().sum(dtype=torch.float64) for x in (moved, asked)]
            sums += torch.stack([*counts, *squares]) / _copies(parameters, processes)
        stored_dtype, self.before = old.dtype, []
        changed, number, served_changed, moved_sq, asked_sq = processes.sum(sums).tolist()
        metrics = {"changed_share": changed / number}
        if asked_sq > 0:
            metrics["update_ratio"] = (moved_sq / asked_sq) ** 0.5
        if self.served_dtype != stored_dtype:
            metrics["served_changed_share"] = served_changed / number
        return metrics

    def _requested(self, group: dict[str, Any], parameters: list[Tensor], old: Tensor) -> Tensor:
        """Return the update of AdamW, from its state after the step (Loshchilov and Hutter 2019, algorithm 2)."""
        states = [self.optimizer.state[parameter] for parameter in parameters]
        steps = float(states[0]["step"])  # all parameters have taken equally many
        mean, square = (_precise(_samples([state[name] for state in states])) for name in ("exp_avg", "exp_avg_sq"))
        beta1, beta2 = group["betas"]
        denominator = (square / (1 - beta2**steps)).sqrt() + group["eps"]
        decay = group["weight_decay"] * _precise(old)
        return -group["lr"] * (mean / (1 - beta1**steps) / denominator + decay)


def _copies(parameters: list[Tensor], processes: Processes) -> int:
    """Return the number of tensor-parallel processes that hold the same weights, such as norms."""
    sharded = parameters[0]
    return processes.world_size // sharded.device_mesh.size() if isinstance(sharded, DTensor) else 1


def _samples(tensors: Sequence[Tensor]) -> Tensor:
    """Return some elements of every tensor, concatenated, so that few operations compare all."""
    flat = [local(x).detach().reshape(-1) for x in tensors]
    return torch.cat([x[:: max(1, len(x) // SAMPLE)] for x in flat])


def _precise(x: Tensor) -> Tensor:
    """Return `x` in float32 or a wider dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
