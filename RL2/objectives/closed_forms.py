"""Pieces that objectives and their closed forms are made of.

The closed forms take p_TV, the whole distribution of each token, and give gradients with respect to its logits;
ids_T names one token of the vocabulary a row, e_i is its indicator.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bounded(exponent: Tensor) -> Tensor:
    """Return `exponent`, bounded from above so that its exponential is finite; its own gradient stays 1.

    For ratios of probabilities, exp(log p - log p_old). An overflow to inf would turn losses and gradients that are 0
    into NaN (0 * inf). The bound leaves a factor of e^8 for what the exponential is multiplied by: 80.7 in float32.
    """
    limit = math.log(torch.finfo(exponent.dtype).max) - 8
    return exponent + (exponent.clamp(max=limit) - exponent).detach()


def prob(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """p_i, [T]."""
    return p_TV.gather(1, ids_T[:, None])[:, 0]


def others(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """1 - p_i, [T], as the sum of the others: a difference would lose its digits near p_i = 1."""
    return p_TV.scatter(1, ids_T[:, None], 0.0).sum(-1)


def dlogp(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """The gradient of log p_i, [T, V]: e_i - p."""
    return (-p_TV).scatter(1, ids_T[:, None], others(p_TV, ids_T)[:, None])


def dp(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """The gradient of p_i, [T, V]: p_i (e_i - p)."""
    return prob(p_TV, ids_T)[:, None] * dlogp(p_TV, ids_T)


def js_summand(logp: Tensor, logq: Tensor) -> Tensor:
    """p log(p / m) / 2 + q log(q / m) / 2 with m = (p + q) / 2, element by element.

    The Jensen-Shannon divergence is its sum. The logarithms come from the difference of the two, so p or q may be too
    small for its format.
    """
    d = logq - logp
    return (logp.exp() * (math.log(2) - F.softplus(d)) + logq.exp() * (math.log(2) - F.softplus(-d))) / 2
