"""Gradients that are taken in the forward pass, from the loss that is expected of each token.

A loss whose value at a token depends on the statistics of that token alone can be differentiated as soon as these are
known, while the token's logits are in memory. The backward pass then needs no logits. It compares the slopes (the
derivatives of the loss with respect to the statistics) that arrive with those that were expected. The gradient is
linear in them, so tokens at which they differ are computed again with the difference, or all with the actual slopes if
most of them differ: the result is the same for any loss, and only its speed depends on the expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from RL2.types import TokenStats

TileLoss = Callable[[TokenStats, Tensor], Tensor]
"""(statistics of C tokens, their indices [C]) -> sum of the weighted losses of these tokens."""

CONSTANT = ("rank", "top_id", "teacher_rank", "teacher_top_id", "overlap_k")
"""Statistics without gradient."""

SLACK = 8
"""Rounding of a slope that counts as none, in units of the precision of the largest one of the statistic."""


@dataclass
class Expected:
    """The expected loss, and how well it was met."""

    loss: TileLoss
    tokens_N: Tensor | None = None
    """Indices of the tokens whose statistics this process computes; None for all."""
    missed: int = 0
    """Number of tokens at which the loss had other slopes."""

    def slopes(self, found: Mapping[str, Tensor], index_C: Tensor) -> dict[str, Tensor]:
        """Return the derivative of the loss with respect to each of the statistics `found` that it reads."""
        with torch.enable_grad():
            leaves = {n: x.detach() if n in CONSTANT else x.detach().requires_grad_() for n, x in found.items()}
            loss = self.loss(TokenStats(**leaves), index_C if self.tokens_N is None else self.tokens_N[index_C])
        free = {name: x for name, x in leaves.items() if x.requires_grad}
        if not (free and loss.requires_grad):
            return {}
        grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
        return {name: grad for name, grad in zip(free, grads, strict=True) if grad is not None}


def unmet(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the actual slopes minus the expected ones; 0 where they differ by rounding only."""
    found = {}
    for name in {**actual, **expected}:
        one, other = actual.get(name), expected.get(name)
        if one is None or other is None:
            found[name] = one if one is not None else -expected[name]
            continue
        largest = one.abs().amax() if one.numel() else one.sum()
        difference = one - other
        # NaN is kept: it compares as False
        found[name] = torch.where(difference.abs() <= SLACK * torch.finfo(one.dtype).eps * largest, 0.0, difference)
    return found
