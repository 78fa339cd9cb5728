"""Policy gradients that act against the fall of entropy, on the tokens that cause most of it.

Notation as in policy_gradient.py: A is the advantage, p_a the probability of the sampled token, r = p_a / p_a_old, and
e_a - p is the gradient of log p_a.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from RL2.config.values import PositiveFloat, Range
from RL2.objectives.closed_forms import dlogp, prob
from RL2.objectives.objective import Loss, needs
from RL2.objectives.ratios import advantage_of, log_ratio, ratio
from RL2.types import TokenBatch, TokenStats

CovarianceShare = Annotated[float, Range(0, 1, open_low=True)]


def _selected(logp_T: Tensor, batch: TokenBatch, share: float) -> Tensor:
    """Return which tokens are among the `share` with the highest covariance, bool [T]."""
    if batch.covariance_rank_T is None:
        return torch.zeros_like(logp_T, dtype=torch.bool)
    return batch.covariance_rank_T < share


def kl_cov_gradient(p_TV: Tensor, batch: TokenBatch, *, share: float = 2e-4, kl_coef: float = 1.0) -> Tensor:
    """Return the gradient of `kl_cov` with respect to the logits, [T, V]."""
    log_ratio_T = log_ratio(prob(p_TV, batch.labels_T).log(), batch)
    penalty_T = kl_coef * log_ratio_T.sign() * _selected(log_ratio_T, batch, share)
    return (penalty_T - ratio(log_ratio_T) * advantage_of(batch))[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=kl_cov_gradient, covariance=True)
def kl_cov(
    stats: TokenStats, batch: TokenBatch, *, share: CovarianceShare = 2e-4, kl_coef: PositiveFloat = 1.0
) -> Loss:
    """Return -r A, plus kl_coef |log r| on the share of the tokens with the highest covariance of A and log p_a_old.

    KL-Cov (arXiv 2505.22617; the loss is that of verl's `kl_cov`). The tokens, at least one, are chosen over the whole
    minibatch of the optimizer step and under the old policy (`batch.covariance_rank_T`). Gradient: (kl_coef sign(log r)
    on these tokens - r A) (e_a - p). On the first update of a rollout, where r is 1, that of `importance_sampling`.
    """
    log_ratio_T = log_ratio(stats.logp, batch)
    selected_T = _selected(log_ratio_T, batch, share).to(log_ratio_T.dtype)
    loss_T = kl_coef * log_ratio_T.abs() * selected_T - ratio(log_ratio_T) * advantage_of(batch)
    return loss_T, {"held": selected_T}
