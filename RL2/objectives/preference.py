"""Losses on pairs of a chosen and a rejected response, with a reference. A pair is a group; the chosen has reward 1.

A pair counts once, and the metrics are those of the pair, so their mean is over pairs. A response without its partner
has a finite loss: an idle process runs on one, with weight 0. Without a reference in the batch, log p_ref is 0.

Notation, besides that of responses.py: c is the chosen, r the rejected response, and m = h_c - h_r the margin. The
implicit reward is beta h. Gradients are by h_c and h_r. Closed forms are for readers and `rl2 check-objective`.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import logsigmoid

from RL2.config.values import NonNegative, PositiveFloat, Range, Share
from RL2.objectives.closed_forms import prob
from RL2.objectives.objective import Loss, needs
from RL2.objectives.responses import Divergence, Pairs, log_ratios, score, score_slope
from RL2.types import TokenBatch, TokenStats

Smoothing = Annotated[float, Range(0, 0.5)]
"""Probability that the label of a pair is wrong."""


def bradley_terry(stats: TokenStats, batch: TokenBatch, *, center_coef: float = 0.0) -> Loss:
    """Return -log s(m) + center_coef (r_c + r_r)^2, m = r_c - r_r, with r the value at the last token of a sequence.

    Bradley and Terry 1952; as a loss of reward models, Ouyang et al. 2022 (arXiv 2203.02155), equation 1. The second
    term keeps the rewards near 0, which m does not say anything about: Eisenstein et al. 2023 (2312.09244), equation 2.
    Gradient: d/dr_c = -s(-m) + 2 center_coef (r_c + r_r), d/dr_r = s(-m) + the same. Without the second term there is
    no minimum: m grows without bound. Every sequence has exactly one action.
    """
    pairs = Pairs(batch)
    margin_B, sum_B = pairs.margin(stats.value), pairs.of_pair(stats.value)
    loss_B = -F.logsigmoid(margin_B) + center_coef * sum_B.square()
    return pairs.at_tokens(loss_B, margin=margin_B, accuracy=(margin_B > 0).float())


def _of(p_TV: Tensor, batch: TokenBatch, *, mean: bool = False) -> tuple[Pairs, Tensor]:
    """Return the pairs, and h of each response under the distributions p, or its mean over tokens, [B]."""
    pairs = Pairs(batch)
    ratio_T = log_ratios(prob(p_TV, batch.labels_T).log(), batch)
    return pairs, pairs.mean(ratio_T) if mean else pairs.sum(ratio_T)


def dpo_gradient(
    p_TV: Tensor,
    batch: TokenBatch,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    ld_alpha: float = 1.0,
    nll_coef: float = 0.0,
) -> Tensor:
    """Return the gradient of `dpo` with respect to the logits, [T, V]."""
    pairs, ratio_T = Pairs(batch), log_ratios(prob(p_TV, batch.labels_T).log(), batch)
    weight_T = pairs.shared_weight(ld_alpha, ratio_T)
    h_B = pairs.sum(weight_T * ratio_T)
    slope_B = -beta * (torch.sigmoid(-beta * pairs.margin(score(h_B, divergence, alpha))) - label_smoothing)
    by_h_B = slope_B * score_slope(h_B, divergence, alpha)
    return pairs.pair_form(p_TV, by_h_B, -by_h_B, weight_T, nll_coef)


@needs("logp", gradient=dpo_gradient, trains_on="pairs", reference=True)
def dpo(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    beta: PositiveFloat = 0.1,
    label_smoothing: Smoothing = 0.0,
    divergence: Divergence = "reverse_kl",
    alpha: NonNegative = 0.5,
    ld_alpha: Share = 1.0,
    nll_coef: NonNegative = 0.0,
) -> Loss:
    """Return -(1 - e) log s(beta m) - e log s(-beta m).

    DPO (arXiv 2305.18290, equation 7). e is the label smoothing: above 0 it is the conservative form of the authors'
    code, where a label is wrong with probability e. Gradient: d/dh_c = -beta (s(-beta m) - e), d/dh_r the negative.
    Zero at s(beta m) = 1 - e, so with e = 0 never.

    `divergence` puts f'(p / p_ref) in the place of h in m (f-DPO, arXiv 2309.16240; `score`), with `alpha` for that of
    its name. `ld_alpha` weighs the tokens beyond the length of the shorter response (LD-DPO, 2409.06411).
    `nll_coef` times the negative log-likelihood of the chosen response is added (iterative RPO, 2404.19733).
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    h_B = pairs.sum(pairs.shared_weight(ld_alpha, ratio_T) * ratio_T)
    margin_B = beta * pairs.margin(score(h_B, divergence, alpha))
    loss_B = -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)
    if not nll_coef:
        return pairs.pair_loss(loss_B, beta * h_B)
    nll_B = pairs.nll(stats.logp)
    return pairs.pair_loss(loss_B + nll_coef * nll_B, beta * h_B, nll=nll_B)


def pivotal_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Return the gradient of `pivotal` with respect to the logits, [T, V]."""
    pairs, ratio_T = Pairs(batch), log_ratios(prob(p_TV, batch.labels_T).log(), batch)
    weight_T = pairs.parting_weight(ratio_T)
    margin_B = pairs.margin(pairs.sum(weight_T * ratio_T))
    slope_B = -beta * (torch.sigmoid(-beta * margin_B) - label_smoothing)
    return pairs.pair_form(p_TV, slope_B, -slope_B, weight_T)


@needs("logp", gradient=pivotal_gradient, trains_on="pairs", reference=True)
def pivotal(
    stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1, label_smoothing: Smoothing = 0.0
) -> Loss:
    """Return the loss of `dpo` with h of one token: the first one in which the responses of the pair differ.

    The pairs of pivotal token search (Phi-4 report, arXiv 2412.08905, section 4.3) have responses of one token, where
    it is DPO; `rl2 credit --pairs` writes such pairs. Gradient: as `dpo`, at this token alone. With equal responses it
    is 0.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    h_B = pairs.sum(pairs.parting_weight(ratio_T) * ratio_T)
    margin_B = beta * pairs.margin(h_B)
    loss_B = -(1 - label_smoothing) * logsigmoid(margin_B) - label_smoothing * logsigmoid(-margin_B)
    return pairs.pair_loss(loss_B, beta * h_B)


def ipo_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `ipo` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch, mean=True)
    slope_B = 2 * (pairs.margin(h_B) - 1 / (2 * beta))
    return pairs.pair_form(p_TV, slope_B, -slope_B, pairs.share_T)


@needs("logp", gradient=ipo_gradient, trains_on="pairs", reference=True)
def ipo(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return (h_c - h_r - 1 / (2 beta))^2, h the mean over the response's tokens of log p - log p_ref.

    IPO (arXiv 2310.12036, equation 17, beta its tau). The paper writes h as a sum; according to its authors their
    results used the mean, which does not grow with the length. Gradient: d/dh_c = 2 (h_c - h_r - 1 / (2
    beta)), d/dh_r the negative. Zero at h_c - h_r = 1 / (2 beta). The metrics are those of `dpo`.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    loss_B = (pairs.margin(pairs.mean(ratio_T)) - 1 / (2 * beta)).square()
    return pairs.pair_loss(loss_B, beta * pairs.sum(ratio_T))


def sigmoid_norm_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `sigmoid_norm` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch, mean=True)
    slope_B = -beta * torch.sigmoid(-beta * pairs.margin(h_B))
    return pairs.pair_form(p_TV, slope_B, -slope_B, pairs.share_T)


@needs("logp", gradient=sigmoid_norm_gradient, trains_on="pairs", reference=True)
def sigmoid_norm(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return -log s(beta m), m the difference of the means over tokens of log p - log p_ref.

    Length-normalised DPO (Tulu 3, arXiv 2411.15124). Gradient: d/dh_c = -beta s(-beta m), d/dh_r the
    negative, h the mean. It has no minimum. The metrics are those of `dpo`.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    loss_B = -logsigmoid(beta * pairs.margin(pairs.mean(ratio_T)))
    return pairs.pair_loss(loss_B, beta * pairs.sum(ratio_T))


def hinge_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `hinge` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch)
    slope_B = -beta * (beta * pairs.margin(h_B) < 1).to(h_B)
    return pairs.pair_form(p_TV, slope_B, -slope_B)


@needs("logp", gradient=hinge_gradient, trains_on="pairs", reference=True)
def hinge(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return max(0, 1 - beta m).

    SLiC-HF's calibration loss on the margin of DPO, as in RSO (arXiv 2309.06657). Gradient: d/dh_c = -beta,
    d/dh_r = beta while beta m < 1; zero beyond.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    reward_B = beta * pairs.sum(ratio_T)
    return pairs.pair_loss((1 - pairs.margin(reward_B)).relu(), reward_B)


def robust_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Return the gradient of `robust` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch)
    wrong_B = torch.sigmoid(-beta * pairs.margin(h_B))
    weight_B = (1 - label_smoothing) * wrong_B + label_smoothing * (1 - wrong_B)
    slope_B = -beta * weight_B / (1 - 2 * label_smoothing)
    return pairs.pair_form(p_TV, slope_B, -slope_B)


@needs("logp", gradient=robust_gradient, trains_on="pairs", reference=True)
def robust(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    beta: PositiveFloat = 0.1,
    label_smoothing: Annotated[float, Range(0, 0.499)] = 0.1,
) -> Loss:
    """Return (-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2 e), e the label smoothing.

    Robust DPO (arXiv 2403.00409): where labels are wrong with probability e, its mean is that of DPO with
    right ones. Gradient: d/dh_c = -beta ((1 - e) s(-beta m) + e s(beta m)) / (1 - 2 e), d/dh_r the negative; never 0.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    reward_B = beta * pairs.sum(ratio_T)
    margin_B = pairs.margin(reward_B)
    loss_B = -(1 - label_smoothing) * logsigmoid(margin_B) + label_smoothing * logsigmoid(-margin_B)
    return pairs.pair_loss(loss_B / (1 - 2 * label_smoothing), reward_B)


def exo_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """Return the gradient of `exo_pair` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch)
    margin_B = beta * pairs.margin(h_B)
    log_odds_B = margin_B - math.log((1 - label_smoothing) / label_smoothing)
    slope_B = beta * torch.sigmoid(margin_B) * torch.sigmoid(-margin_B) * log_odds_B
    return pairs.pair_form(p_TV, slope_B, -slope_B)


@needs("logp", gradient=exo_gradient, trains_on="pairs", reference=True)
def exo_pair(
    stats: TokenStats,
    batch: TokenBatch,
    *,
    beta: PositiveFloat = 0.1,
    label_smoothing: Annotated[float, Range(1e-6, 0.499)] = 1e-3,
) -> Loss:
    """Return KL(q || (1 - e, e)) with q = (s(beta m), s(-beta m)) and e the label smoothing.

    EXO for pairs (arXiv 2402.00856, equation 16): the divergence of DPO's two-way distribution in the other direction.
    Gradient: d/dh_c = beta q_c q_r (beta m - log((1 - e) / e)), d/dh_r the negative. Zero at s(beta m) = 1 - e; it also
    vanishes where beta m is far from 0.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    reward_B = beta * pairs.sum(ratio_T)
    margin_B = pairs.margin(reward_B)
    right_B = torch.sigmoid(margin_B) * (logsigmoid(margin_B) - math.log1p(-label_smoothing))
    wrong_B = torch.sigmoid(-margin_B) * (logsigmoid(-margin_B) - math.log(label_smoothing))
    return pairs.pair_loss(right_B + wrong_B, reward_B)


def nca_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `nca_pair` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch)
    above_B = torch.sigmoid(beta * h_B)
    return pairs.pair_form(p_TV, beta * (1.5 * above_B - 1), beta * above_B / 2)


@needs("logp", gradient=nca_gradient, trains_on="pairs", reference=True)
def nca_pair(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return -log s(beta h_c) - (log s(-beta h_c) + log s(-beta h_r)) / 2.

    NCA with two responses (arXiv 2402.05369). Gradient: d/dh_c = beta (1.5 s(beta h_c) - 1), d/dh_r =
    beta s(beta h_r) / 2. The first is zero at s(beta h_c) = 2 / 3: the likelihood of the chosen response stays above
    that of the reference.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    reward_B = beta * pairs.sum(ratio_T)
    both_B = pairs.of_pair(-logsigmoid(-reward_B)) / 2
    return pairs.pair_loss(pairs.chosen(-logsigmoid(reward_B)) + both_B, reward_B)


def bco_pair_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `bco_pair` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch)
    return pairs.pair_form(p_TV, -beta * torch.sigmoid(-beta * h_B), beta * torch.sigmoid(beta * h_B))


@needs("logp", gradient=bco_pair_gradient, trains_on="pairs", reference=True)
def bco_pair(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return -log s(beta h_c) - log s(-beta h_r).

    Binary classification of responses (BCO, arXiv 2404.04656) without the reward shift. Gradient: d/dh_c =
    -beta s(-beta h_c), d/dh_r = beta s(beta h_r). It has no minimum; it bounds the loss of DPO from above.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    reward_B = beta * pairs.sum(ratio_T)
    return pairs.pair_loss(pairs.chosen(-logsigmoid(reward_B)) + pairs.rejected(-logsigmoid(-reward_B)), reward_B)


def _bump(x: Tensor) -> Tensor:
    """Return s(x) s(-x), the derivative of s."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def apo_zero_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `apo_zero` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch)
    return pairs.pair_form(p_TV, -beta * _bump(beta * h_B), beta * _bump(beta * h_B))


@needs("logp", gradient=apo_zero_gradient, trains_on="pairs", reference=True)
def apo_zero(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return 1 - s(beta h_c) + s(beta h_r): raise the chosen, lower the rejected response.

    APO-zero (arXiv 2408.06266, equation 7), for chosen responses better than the model's own. Gradient, with s' = s(x)
    s(-x): d/dh_c = -beta s'(beta h_c), d/dh_r = beta s'(beta h_r). Both vanish far from the reference.
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    reward_B = beta * pairs.sum(ratio_T)
    return pairs.pair_loss(pairs.chosen(torch.sigmoid(-reward_B)) + pairs.rejected(torch.sigmoid(reward_B)), reward_B)


def apo_down_gradient(p_TV: Tensor, batch: TokenBatch, *, beta: float = 0.1) -> Tensor:
    """Return the gradient of `apo_down` with respect to the logits, [T, V]."""
    pairs, h_B = _of(p_TV, batch)
    apart_B = beta * _bump(beta * pairs.margin(h_B))
    return pairs.pair_form(p_TV, beta * _bump(beta * h_B) - apart_B, apart_B)


@needs("logp", gradient=apo_down_gradient, trains_on="pairs", reference=True)
def apo_down(stats: TokenStats, batch: TokenBatch, *, beta: PositiveFloat = 0.1) -> Loss:
    """Return s(beta h_c) + 1 - s(beta m): lower the chosen response, and the rejected one more.

    APO-down (arXiv 2408.06266, equation 8), for chosen responses worse than the model's own. Gradient, with s' = s(x)
    s(-x): d/dh_c = beta (s'(beta h_c) - s'(beta m)), d/dh_r = beta s'(beta m).
    """
    pairs, ratio_T = Pairs(batch), log_ratios(stats.logp, batch)
    reward_B = beta * pairs.sum(ratio_T)
    return pairs.pair_loss(pairs.chosen(torch.sigmoid(reward_B)) + torch.sigmoid(-pairs.margin(reward_B)), reward_B)
