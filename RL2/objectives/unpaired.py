"""Losses on single responses with a label, good or bad. A good response has reward 1. Notation as in responses.py.

The baseline z is one number for the optimizer step, which the trainer computes before it (trainer/unpaired.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from RL2.config.values import NonNegative, PositiveFloat
from RL2.objectives.closed_forms import prob
from RL2.objectives.objective import Loss, needs
from RL2.objectives.responses import Responses, log_ratios
from RL2.types import TokenBatch, TokenStats


def _above(responses: Responses, logp_T: Tensor, beta: float) -> Tensor:
    """Return beta (h - z) of good and beta (z - h) of bad responses, [B]: what every loss here wants to be large."""
    h_B = responses.sum(log_ratios(logp_T, responses.batch))
    return torch.where(responses.good_B, 1.0, -1.0).to(h_B) * beta * (h_B - responses.baseline_B)


def _closed_form(p_TV: Tensor, responses: Responses, by_above_B: Tensor, beta: float) -> Tensor:
    return responses.closed_form(p_TV, beta * torch.where(responses.good_B, by_above_B, -by_above_B))


def _with_metrics(responses: Responses, loss_B: Tensor, above_B: Tensor, reward_B: Tensor) -> Loss:
    return responses.at_tokens(loss_B, reward=reward_B, accuracy=(above_B > 0).float())


def kto_gradient(
    p_TV: Tensor,
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the gradient of `kto` with respect to the logits, [T, V]."""
    responses = Responses(batch)
    above_B = _above(responses, prob(p_TV, batch.labels_T).log(), beta)
    weight_B = torch.where(responses.good_B, desirable_weight, undesirable_weight)
    return _closed_form(p_TV, responses, -weight_B * torch.sigmoid(above_B) * torch.sigmoid(-above_B), beta)


@needs("logp", gradient=kto_gradient, trains_on="labels", reference=True)
def kto(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    beta: PositiveFloat = 0.1,
    desirable_weight: NonNegative = 1.0,
    undesirable_weight: NonNegative = 1.0,
) -> Loss:
    """Return w (1 - s(x)), x = beta (h - z) of a good and beta (z - h) of a bad response, w the weight of its label.

    KTO (arXiv 2402.01306, equation 7). z, an estimate of KL(policy || reference) and a constant, is the mean of
    h over prompts with a response to another prompt, at least 0. Gradient: d/dh = -w beta s(x) s(-x) if good, the
    negative if bad; it vanishes far from z on both sides.
    """
    responses = Responses(batch)
    above_B = _above(responses, stats.logp, beta)
    weight_B = torch.where(responses.good_B, desirable_weight, undesirable_weight).to(above_B)
    reward_B = beta * responses.sum(log_ratios(stats.logp, batch))
    return _with_metrics(responses, weight_B * torch.sigmoid(-above_B), above_B, reward_B)


def apo_zero_unpaired_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `apo_zero_unpaired` with respect to the logits, [T, V]."""
    return kto_gradient(p_TV, replace(batch, baseline_T=None), beta=beta)


@needs("logp", gradient=apo_zero_unpaired_gradient, trains_on="labels", reference=True)
def apo_zero_unpaired(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return 1 - s(beta h) of a good and s(beta h) of a bad response.

    APO-zero (arXiv 2408.06266, equation 7) for single responses: `kto` with z = 0 and equal weights.
    """
    loss: Loss = kto(stats, replace(batch, baseline_T=None), beta=beta)
    return loss


def bco_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `bco` with respect to the logits, [T, V]."""
    responses = Responses(batch)
    above_B = _above(responses, prob(p_TV, batch.labels_T).log(), beta)
    return _closed_form(p_TV, responses, -torch.sigmoid(-above_B), beta)


@needs("logp", gradient=bco_gradient, trains_on="labels", reference=True)
def bco(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return -log s(x), x = beta (h - z) of a good and beta (z - h) of a bad response.

    BCO (arXiv 2404.04656): beta z is the reward shift, the mean of beta h over all responses that the run
    has seen, a constant. Gradient: d/dh = -beta s(-x) if good, the negative if bad.
    """
    responses = Responses(batch)
    above_B = _above(responses, stats.logp, beta)
    return _with_metrics(responses, -logsigmoid(above_B), above_B, beta * responses.sum(log_ratios(stats.logp, batch)))
