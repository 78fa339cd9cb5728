"""Masks against off-policy data: each leaves the objective of whole sequences out, by one ratio and with one metric.

Notation: p is the probability of a sampled token now, p_old under the trainer's policy before the updates on the
rollout, and p_engine under the engine that sampled it. Masks are constants, and are multiplied: they compose with each
other, with the importance weight, and with every objective. Means are over the actions of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from RL2.config.model import Masks
from RL2.objectives.ratios import advantage_of, sequence_mean
from RL2.types import TokenBatch


def masks(logp_T: Tensor, old_logp_T: Tensor, batch: TokenBatch, config: Masks) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the mask of each mask that is on, 1 where the objective stays and 0 elsewhere, [T]."""
    logp_T, old_logp_T = logp_T.detach(), old_logp_T.detach()
    if config.geometric_low > 0 or config.geometric_high is not None:
        yield "geometric", inside_geometric(old_logp_T, batch, config.geometric_low, config.geometric_high)
    if config.veto > 0:
        yield "veto", without_outlier(old_logp_T, batch, config.veto)
    if config.stale_kl is not None:
        yield "stale", unless_stale(logp_T, batch, config.stale_kl)


def inside_geometric(old_logp_T: Tensor, batch: TokenBatch, low: float, high: float | None) -> Tensor:
    """Return 1 for sequences whose geometric mean of p_old / p_engine is in [low, high], [T].

    The geometric mask of masked importance sampling (MIS). A mean, it does not depend on the length of the sequence.
    """
    ratio_T = sequence_mean(old_logp_T - _engine(batch), batch).exp()
    inside_T = ratio_T >= low
    return (inside_T if high is None else inside_T & (ratio_T <= high)).to(old_logp_T.dtype)


def without_outlier(old_logp_T: Tensor, batch: TokenBatch, low: float) -> Tensor:
    """Return 1 for sequences without a token whose p_old / p_engine is below `low`, [T].

    The token veto of MIS: one token that the trainer holds nearly impossible speaks against the whole sequence.
    """
    is_outlier_T = (old_logp_T - _engine(batch)).exp() < low
    has_one_B = torch.zeros_like(batch.lengths_B).index_add_(0, batch.sequence_T, is_outlier_T.long()) > 0
    return (~has_one_B[batch.sequence_T]).to(old_logp_T.dtype)


def unless_stale(logp_T: Tensor, batch: TokenBatch, limit: float) -> Tensor:
    """Return 0 for tokens with A < 0 in sequences whose mean of log(p_engine / p) is above `limit`, 1 elsewhere, [T].

    Off-policy sequence masking of DeepSeek-V3.2 (arXiv 2512.02556): the policy has moved far from a sequence that it is
    pushed further away from. The mean is an estimate of KL(engine || policy) for each token.
    """
    is_far_T = sequence_mean(_engine(batch) - logp_T, batch) > limit
    return (~(is_far_T & (advantage_of(batch) < 0))).to(logp_T.dtype)


def _engine(batch: TokenBatch) -> Tensor:
    assert batch.engine_logp_T is not None
    return batch.engine_logp_T
