"""Functions that objectives and their closed forms share.

The closed forms take p_TV, the whole distribution of each token, and return gradients with respect to its logits.
ids_T has one token i of the vocabulary for each row; e_i is its indicator.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def bounded(exponent: Tensor) -> Tensor:
    """Return `exponent`, bounded from above so that its exponential is finite; its own gradient stays 1.

    Used for ratios of probabilities, exp(log p - log p_old): an overflow to inf would turn losses and gradients that
    are 0 into NaN (0 * inf). The bound, 80.7 in float32, leaves a factor of e^8 for what the exponential is multiplied
    by.
    """
    limit = math.log(torch.finfo(exponent.dtype).max) - 8
    return exponent + (exponent.clamp(max=limit) - exponent).detach()


def prob(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Return p_i, [T]."""
    return p_TV.gather(1, ids_T[:, None])[:, 0]


def others(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Return 1 - p_i, [T], as the sum of the other probabilities: a difference would lose its digits near p_i = 1."""
    return p_TV.scatter(1, ids_T[:, None], 0.0).sum(-1)


def dlogp(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Return the gradient of log p_i, [T, V]: e_i - p."""
    return (-p_TV).scatter(1, ids_T[:, None], others(p_TV, ids_T)[:, None])


def dp(p_TV: Tensor, ids_T: Tensor) -> Tensor:
    """Return the gradient of p_i, [T, V]: p_i (e_i - p)."""
    return prob(p_TV, ids_T)[:, None] * dlogp(p_TV, ids_T)


def js_summand(logp: Tensor, logq: Tensor) -> Tensor:
    """Return p log(p / m) / 2 + q log(q / m) / 2 with m = (p + q) / 2, element by element.

    The Jensen-Shannon divergence is the sum. The logarithms are computed from the difference of log p and log q, so p
    or q may underflow.
    """
    d = logq - logp
    return (logp.exp() * (math.log(2) - F.softplus(d)) + logq.exp() * (math.log(2) - F.softplus(-d))) / 2
