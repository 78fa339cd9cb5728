"""Advantages and ratios of probabilities that policy-gradient objectives share.

Notation: r = p_a / p_a_old, where p_a_old is the probability of the sampled token under the old policy; on the first
update of a rollout r is 1.
"""

from __future__ import annotations

from torch import Tensor

from RL2.objectives.closed_forms import bounded
from RL2.types import TokenBatch


def advantage_of(batch: TokenBatch) -> Tensor:
    """Return the advantage of each token, [T]."""
    assert batch.advantage_T is not None, "no advantages: set batch.advantage_T"
    return batch.advantage_T


def old_logp_of(logp_T: Tensor, batch: TokenBatch) -> Tensor:
    """Return log p_a_old, [T]: on the first update of a rollout that of the policy itself, as a constant."""
    return logp_T.detach() if batch.old_logp_T is None else batch.old_logp_T


def log_ratio(logp_T: Tensor, batch: TokenBatch) -> Tensor:
    """Return log r, [T]."""
    return logp_T - old_logp_of(logp_T, batch)


def ratio(log_ratio_T: Tensor) -> Tensor:
    """Return r, finite for every log r."""
    return bounded(log_ratio_T).exp()


def clamp(ratio_T: Tensor, clip: float, clip_high: float | None) -> Tensor:
    """Return r within [1 - clip, 1 + clip_high], where `clip_high` is `clip` unless it is given."""
    return ratio_T.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))


def sequence_sum(x_T: Tensor, batch: TokenBatch) -> Tensor:
    """Return the sum of each sequence, at each of its tokens, [T]."""
    return x_T.new_zeros(batch.num_sequences).index_add(0, batch.sequence_T, x_T)[batch.sequence_T]


def sequence_mean(x_T: Tensor, batch: TokenBatch) -> Tensor:
    """Return the mean of each sequence, at each of its tokens, [T]."""
    sum_B = x_T.new_zeros(batch.num_sequences).index_add(0, batch.sequence_T, x_T)
    return (sum_B / batch.lengths_B.clamp(min=1))[batch.sequence_T]
