"""Losses on pairs that need no reference. Notation as in preference.py, with h the sum, and u the mean, of log p."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from RL2.config.values import NonNegative, PositiveFloat
from RL2.objectives.closed_forms import prob
from RL2.objectives.objective import Loss, needs
from RL2.objectives.preference import Smoothing
from RL2.objectives.responses import Pairs
from RL2.types import TokenBatch, TokenStats


def cpo_gradient(
    p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1, label_smoothing: float = 0.0, nll_coef: float = 1.0
) -> Tensor:
    """Return the gradient of `cpo` with respect to the logits, [T, V]."""
    pairs = Pairs(batch)
    margin_B = pairs.margin(pairs.sum(prob(p_TV, batch.labels_T).log()))
    slope_B = -beta * (torch.sigmoid(-beta * margin_B) - label_smoothing)
    return pairs.pair_form(p_TV, slope_B, -slope_B, nll_coef=nll_coef)


@needs("logp", gradient=cpo_gradient, trains_on="pairs")
def cpo(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    beta: PositiveFloat = 0.1,
    label_smoothing: Smoothing = 0.0,
    nll_coef: NonNegative = 1.0,
) -> Loss:
    """Return -(1 - e) log s(beta m) - e log s(-beta m) + nll_coef times the negative log-likelihood of the chosen one.

    CPO (arXiv 2401.08417, equation 3): DPO with a uniform reference, and behaviour cloning. e is the label
    smoothing, m = h_c - h_r. Gradient: d/dh_c = -beta (s(-beta m) - e), d/dh_r the negative, and that of the
    log-likelihood.
    """
    pairs = Pairs(batch)
    reward_B, nll_B = beta * pairs.sum(stats.logp), pairs.nll(stats.logp)
    margin_B = pairs.margin(reward_B)
    loss_B = -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)
    return pairs.pair_loss(loss_B + nll_coef * nll_B, reward_B, nll=nll_B)


def simpo_gradient(
    p_TV: Tensor, batch: TokenBatch, *, beta: float = 2.0, gamma: float = 1.0, nll_coef: float = 0.0
) -> Tensor:
    """Return the gradient of `simpo` with respect to the logits, [T, V]."""
    pairs = Pairs(batch)
    margin_B = beta * pairs.margin(pairs.mean(prob(p_TV, batch.labels_T).log())) - gamma
    slope_B = -beta * torch.sigmoid(-margin_B)
    return pairs.pair_form(p_TV, slope_B, -slope_B, pairs.share_T, nll_coef)


@needs("logp", gradient=simpo_gradient, trains_on="pairs")
def simpo(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    beta: PositiveFloat = 2.0,
    gamma: NonNegative = 1.0,
    nll_coef: NonNegative = 0.0,
) -> Loss:
    """Return -log s(beta (u_c - u_r) - gamma), the implicit reward being beta u.

    SimPO (arXiv 2405.14734, equation 6); with `nll_coef` above 0, CPO-SimPO, which adds the negative log-likelihood of
    the chosen response. Gradient: d/du_c = -beta s(gamma - beta (u_c - u_r)), d/du_r the negative. It has no minimum.
    """
    pairs = Pairs(batch)
    reward_B = beta * pairs.mean(stats.logp)
    loss_B = -logsigmoid(pairs.margin(reward_B) - gamma)
    if not nll_coef:
        return pairs.pair_loss(loss_B, reward_B)
    nll_B = pairs.nll(stats.logp)
    return pairs.pair_loss(loss_B + nll_coef * nll_B, reward_B, nll=nll_B)


def _log_odds(u_B: Tensor) -> Tensor:
    """Return u - log(1 - e^u); u is bounded away from 0, where the odds are infinite."""
    u_B = u_B.clamp(max=-torch.finfo(u_B.dtype).tiny)
    return u_B - torch.log(-torch.expm1(u_B))


def orpo_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `orpo` with respect to the logits, [T, V]."""
    pairs = Pairs(batch)
    u_B = pairs.mean(prob(p_TV, batch.labels_T).log())
    slope_B = -beta * torch.sigmoid(-pairs.margin(_log_odds(u_B)))
    return pairs.pair_form(p_TV, slope_B / -u_B.expm1(), slope_B / u_B.expm1(), pairs.share_T, nll_coef=1.0)


@needs("logp", gradient=orpo_gradient, trains_on="pairs")
def orpo(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return the negative log-likelihood of the chosen response - beta log s(o_c - o_r), o = u - log(1 - exp(u)).

    ORPO (arXiv 2403.07691, equation 7, beta its lambda); o are the log-odds of the mean likelihood per token.
    Gradient of the second term: d/du_c = -beta s(o_r - o_c) / (1 - exp(u_c)), d/du_r = beta s(o_r - o_c) / (1 -
    exp(u_r)). The implicit reward is beta u.
    """
    pairs = Pairs(batch)
    u_B, nll_B = pairs.mean(stats.logp), pairs.nll(stats.logp)
    loss_B = nll_B - beta * logsigmoid(pairs.margin(_log_odds(u_B)))
    return pairs.pair_loss(loss_B, beta * u_B, nll=nll_B)
