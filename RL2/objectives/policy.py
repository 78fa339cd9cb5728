"""The policy-gradient family."""

from __future__ import annotations

import torch

from RL2.objectives.declare import Loss, needs
from RL2.types import TokenBatch, TokenStats


@needs("logp")
def ppo(stats: TokenStats, batch: TokenBatch, *, clip: float = 0.2) -> Loss:
    """-min(r A, clamp(r, 1 - clip, 1 + clip) A) with r = p_a / p_a_old (Schulman et al. 2017, equation 7).

    p_a_old is the policy's own probability when the rollout arrived; on the first of its updates r is 1 and the
    gradient is REINFORCE's, -A (e_a - p). Zero gradient where the ratio has left the trust region in the direction of
    A.
    """
    assert batch.advantage_T is not None
    old_logp_T = stats.logp.detach() if batch.old_logp_T is None else batch.old_logp_T
    ratio_T = (stats.logp - old_logp_T).exp()
    free_T = ratio_T * batch.advantage_T
    clipped_T = ratio_T.clamp(1 - clip, 1 + clip) * batch.advantage_T
    return -torch.minimum(free_T, clipped_T), {"clipped": (clipped_T < free_T).float()}
