"""Gradients that are taken in the forward pass, from the loss that is expected of each token.

A loss whose value at a token depends on the statistics of that token alone can be differentiated as soon as these are
known, while the token's logits are in memory. The backward pass then needs no logits. It compares the slopes (the
derivatives of the loss with respect to the statistics) that arrive with those that were expected. The gradient is
linear in them, so tokens at which they differ are computed again with the difference, or all with the actual slopes if
most of them differ: the result is the same for any loss, and only its speed depends on the expectation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from RL2.types import TokenStats

TileLoss = Callable[[TokenStats, Tensor], Tensor]
"""(statistics of C tokens, their indices [C]) -> sum of the weighted losses of these tokens."""

Complete = Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]]
"""(some statistics of C tokens, their indices [C]) -> all that the loss reads."""

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

    def slopes(
        self, found: Mapping[str, Tensor], index_C: Tensor, complete: Complete = lambda found, index_C: found
    ) -> dict[str, Tensor]:
        """Return the derivative of the loss with respect to each of the statistics `found` that it reads.

        `complete` adds those that are not differentiated, and those that are made of these.
        """
        with torch.enable_grad():
            leaves = {n: x.detach() if n in CONSTANT else x.detach().requires_grad_() for n, x in found.items()}
            loss = self.loss(
                TokenStats(**complete(leaves, index_C)), index_C if self.tokens_N is None else self.tokens_N[index_C]
            )
        free = {name: x for name, x in leaves.items() if x.requires_grad}
        if not (free and loss.requires_grad):
            return {}
        grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
        return {name: grad for name, grad in zip(free, grads, strict=True) if grad is not None}


def joined(parts: Sequence[dict[str, Tensor]], like: Sequence[dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
    """Return the values of all tiles by name; where one lacks a name, zeros like those of `like`."""
    names = {name: None for part in parts for name in part}
    whole = {}
    for name in names:
        each = [part.get(name) for part in parts]
        if like is not None:
            each = [torch.zeros_like(one[name]) if x is None else x for x, one in zip(each, like, strict=True)]
        whole[name] = torch.cat(each)  # type: ignore[arg-type]
    return whole


def with_slope(slopes: Mapping[str, Tensor], like_TD: Tensor) -> Tensor:
    """Return the mask of the tokens that have a slope which is not 0, bool [T], for as many as `like_TD` has."""
    found_T = torch.zeros_like(like_TD[:, 0], dtype=torch.bool)
    for x in slopes.values():
        found_T = found_T | (x != 0 if x.dim() == 1 else (x != 0).any(-1))
    return found_T


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
