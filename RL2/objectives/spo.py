"""The SPO family: token-level objectives on successful rollouts.

Notation: p_a is the probability of the sampled token, p_m of the most likely one, Bern(p) the distribution over "this
token" and "any other". Gradients are with respect to the logits z; e_a is the indicator of a, dp_x = p_x (e_x - p).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from RL2.objectives.closed_forms import dlogp, dp, js_summand, others, prob
from RL2.objectives.objective import Loss, needs
from RL2.types import TokenBatch, TokenStats


def cross_entropy_gradient(p_TV: Tensor, batch: TokenBatch) -> Tensor:
    """Return the gradient of `cross_entropy` with respect to the logits, [T, V]."""
    return -dlogp(p_TV, batch.labels_T)


@needs("logp", gradient=cross_entropy_gradient)
def cross_entropy(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Return the cross-entropy, -log p_a.

    This is SFT; on successful rollouts (`positive_ce`) it is REINFORCE with the reward 1 and no baseline.
    Gradient: p - e_a. Zero, with zero gradient, at p_a = 1 only.
    """
    return -stats.logp, {}


def spo_gradient(p_TV: Tensor, batch: TokenBatch, *, detach_target: bool = False) -> Tensor:
    """Return the gradient of `spo` with respect to the logits, [T, V]."""
    a_T, m_T = batch.labels_T, p_TV.argmax(-1)
    p_a, p_m, rest_a, rest_m = prob(p_TV, a_T), prob(p_TV, m_T), others(p_TV, a_T), others(p_TV, m_T)
    gradient_TV = ((p_a - p_m) / rest_a)[:, None] * dlogp(p_TV, a_T)
    if not detach_target:
        gradient_TV = gradient_TV + (p_m * rest_a / (p_a * rest_m)).log()[:, None] * dp(p_TV, m_T)
    return gradient_TV


@needs("logp", "log1mp", "max_logp", "max_log1mp", gradient=spo_gradient)
def spo(stats: TokenStats, batch: TokenBatch, *, detach_target: bool = False) -> Loss:
    """Return KL(Bern(p_m) || Bern(p_a)) = p_m log(p_m / p_a) + (1 - p_m) log((1 - p_m) / (1 - p_a)).

    Thesis, sections 3.1 and 3.2 (they differ in `actor.average_over`). Zero, with zero gradient, where a = m.
    Gradient: (p_a - p_m) / (p_a (1 - p_a)) dp_a + log(p_m (1 - p_a) / (p_a (1 - p_m))) dp_m; `detach_target` drops the
    second term.
    """
    logp, log1mp, max_logp, max_log1mp = stats.logp, stats.log1mp, stats.max_logp, stats.max_log1mp
    off_mode = {"off_mode": (logp < max_logp).float()}
    if detach_target:
        max_logp, max_log1mp = max_logp.detach(), max_log1mp.detach()
    loss_T = max_logp.exp() * (max_logp - logp) + max_log1mp.exp() * (max_log1mp - log1mp)
    if not detach_target:
        return loss_T, off_mode
    # where a = m the loss is 0; an exact zero is better than a rounded one
    return torch.where(logp == max_logp, loss_T.detach() * 0, loss_T), off_mode


def binary_jsd_gradient(p_TV: Tensor, batch: TokenBatch, *, detach_target: bool = False) -> Tensor:
    """Return the gradient of `binary_jsd` with respect to the logits, [T, V]."""
    a_T, m_T = batch.labels_T, p_TV.argmax(-1)
    p_a, p_m, rest_a, rest_m = prob(p_TV, a_T), prob(p_TV, m_T), others(p_TV, a_T), others(p_TV, m_T)
    odds_T = (p_a + p_m) / (rest_a + rest_m)  # of Bern(M)
    gradient_TV = (p_a / rest_a / odds_T).log()[:, None] / 2 * dp(p_TV, a_T)
    if not detach_target:
        gradient_TV = gradient_TV + (p_m / rest_m / odds_T).log()[:, None] / 2 * dp(p_TV, m_T)
    return gradient_TV


@needs("logp", "log1mp", "max_logp", "max_log1mp", gradient=binary_jsd_gradient)
def binary_jsd(stats: TokenStats, batch: TokenBatch, *, detach_target: bool = False) -> Loss:
    """Return JSD(Bern(p_m), Bern(p_a)).

    JSD = KL(Bern(p_m) || Bern(M)) / 2 + KL(Bern(p_a) || Bern(M)) / 2 with M = (p_m + p_a) / 2.
    The Jensen-Shannon form of `spo`, at most log 2. Zero, with zero gradient, where a = m. Gradient, with the log-odds
    l(p) = log(p / (1 - p)): (l(p_a) - l(M)) / 2 dp_a + (l(p_m) - l(M)) / 2 dp_m; `detach_target` drops the second term.
    As p_a goes to 0 the first term vanishes; that of `spo` goes to -p_m (e_a - p).
    """
    logp, log1mp, max_logp, max_log1mp = stats.logp, stats.log1mp, stats.max_logp, stats.max_log1mp
    off_mode_T = logp < max_logp
    if detach_target:
        max_logp, max_log1mp = max_logp.detach(), max_log1mp.detach()
    loss_T = js_summand(logp, max_logp) + js_summand(log1mp, max_log1mp)
    return torch.where(off_mode_T, loss_T, loss_T.detach() * 0), {"off_mode": off_mode_T.float()}


Region = Literal["above_half", "all", "below_half"]


def spo_0p5_gradient(p_TV: Tensor, batch: TokenBatch, *, region: Region = "above_half") -> Tensor:
    """Return the gradient of `spo_0p5` with respect to the logits, [T, V]."""
    p_a, rest_a = prob(p_TV, batch.labels_T), others(p_TV, batch.labels_T)
    inside_T = {"above_half": p_a > 0.5, "all": p_a > -1, "below_half": p_a <= 0.5}[region]
    return (inside_T * (p_a - rest_a) / (2 * rest_a))[:, None] * dlogp(p_TV, batch.labels_T)


@needs("logp", "log1mp", gradient=spo_0p5_gradient)
def spo_0p5(stats: TokenStats, batch: TokenBatch, *, region: Region = "above_half") -> Loss:
    """Return KL(Bern(1/2) || Bern(p_a)) = -(log p_a + log(1 - p_a)) / 2 + log(1/2), on the tokens of `region`.

    Thesis, section 3.3. Zero, with zero gradient, at p_a = 1/2. Gradient: (2 p_a - 1) / (2 (1 - p_a)) (e_a - p): a step
    against it moves p_a towards a half, from above and from below. `above_half` keeps log p_a > log(1/2) only, as the
    fork does; `all` is the formula as published. Tokens outside the region have loss 0 and still count in the average.
    """
    logp, log1mp = stats.logp, stats.log1mp
    loss_T = -0.5 * (logp + log1mp) + math.log(0.5)
    above_T = logp.detach() > math.log(0.5)
    inside_T = {"above_half": above_T, "all": torch.ones_like(above_T), "below_half": ~above_T}[region]
    return torch.where(inside_T, loss_T, loss_T.detach() * 0), {"in_region": inside_T.float()}
