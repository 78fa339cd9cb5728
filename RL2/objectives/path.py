"""The SPO family: token-level objectives on successful rollouts.

Notation: p_a is the probability of the sampled token, p_m of the most likely one, Bern(p) the distribution over "this
token" and "any other". Gradients are with respect to the logits z; e_a is the indicator of a.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from RL2.objectives.declare import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def cross_entropy(stats: TokenStats, batch: TokenBatch) -> Loss:
    """Cross-entropy, -log p_a.

    Gradient: p - e_a. Zero at p_a = 1.
    """
    return -stats.logp, {}


@needs("logp", "log1mp", "max_logp", "max_log1mp")
def spo(stats: TokenStats, batch: TokenBatch, *, detach_target: bool = False) -> Loss:
    """KL(Bern(p_m) || Bern(p_a)) = p_m log(p_m / p_a) + (1 - p_m) log((1 - p_m) / (1 - p_a)).

    Thesis, sections 3.1 and 3.2 (they differ in `actor.average_over`). Zero, with zero gradient, where a = m.
    Gradient: (p_a - p_m) / (p_a (1 - p_a)) dp_a + log(p_m (1 - p_a) / (p_a (1 - p_m))) dp_m, with dp_x = p_x (e_x - p);
    `detach_target` drops the second term.
    """
    logp, log1mp, max_logp, max_log1mp = stats.logp, stats.log1mp, stats.max_logp, stats.max_log1mp
    off_mode = {"off_mode": (logp < max_logp).float()}
    if detach_target:
        max_logp, max_log1mp = max_logp.detach(), max_log1mp.detach()
    loss_T = max_logp.exp() * (max_logp - logp) + max_log1mp.exp() * (max_log1mp - log1mp)
    if not detach_target:
        return loss_T, off_mode
    # a = m: the detached target is the token itself, and the exact zero is worth more than a rounded one
    return torch.where(logp == max_logp, loss_T.detach() * 0, loss_T), off_mode


@needs("logp", "log1mp")
def spo_0p5(
    stats: TokenStats, batch: TokenBatch, *, region: Literal["above_half", "all", "below_half"] = "above_half"
) -> Loss:
    """KL(Bern(1/2) || Bern(p_a)) = -(log p_a + log(1 - p_a)) / 2 + log(1/2), on the tokens of `region`.

    Thesis, section 3.3. Zero, with zero gradient, at p_a = 1/2. Gradient: (2 p_a - 1) / (2 (1 - p_a)) (e_a - p): it
    pushes probabilities above a half down and those below up. `above_half` keeps log p_a > log(1/2) only, as the fork
    does; `all` is the formula as published. Tokens outside the region have loss 0 and still count in the average.
    """
    logp, log1mp = stats.logp, stats.log1mp
    loss_T = -0.5 * (logp + log1mp) + math.log(0.5)
    above_T = logp.detach() > math.log(0.5)
    inside_T = {"above_half": above_T, "all": torch.ones_like(above_T), "below_half": ~above_T}[region]
    return torch.where(inside_T, loss_T, loss_T.detach() * 0), {"in_region": inside_T.float()}
