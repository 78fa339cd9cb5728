"""Pieces that objectives and their closed forms are made of.

The closed forms take p_TV, the whole distribution of each token, and give gradients with respect to its logits;
ids_T names one token of the vocabulary a row, e_i is its indicator.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


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
