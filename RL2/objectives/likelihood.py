"""Objectives on the likelihood of given responses, for data and for successful rollouts."""

from __future__ import annotations

from torch import Tensor

from RL2.objectives.closed_forms import dlogp, prob
from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


def dft_gradient(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return the gradient of `dft` with respect to the logits, [T, V]."""
    return -prob(p_TV, batch.labels_T)[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=dft_gradient)
def dft(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Return -w log p_a with the constant w = p_a: dynamic fine-tuning (arXiv 2508.05629).

    Gradient: -p_a (e_a - p), that of -p_a. Zero at p_a = 1 and as p_a goes to 0: a token that the model holds
    impossible is not pulled up.
    """
    return -stats.logp.detach().exp() * stats.logp, {}
