"""The loss of a critic: a pure function of action tokens, like objectives.

Notation: v is the critic's value before the token, v_old the value under the critic before the update, R the return.
"""

from __future__ import annotations

import torch

from RL2.objectives.objective import Loss
from RL2.types import TokenBatch, TokenStats


def clipped_value(stats: TokenStats, batch: TokenBatch, *, clip: float) -> Loss:
    """Return max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2) / 2.

    The value loss of OpenAI Baselines' ppo2, which is not in the paper of PPO; studied in arXiv 2005.12729. Gradient
    with respect to v: v - R; zero where v is further than `clip` from v_old and nearer to R than the clamped value.
    """
    assert batch.value_T is not None
    assert batch.return_T is not None
    clamped_T = torch.clamp(stats.value, batch.value_T - clip, batch.value_T + clip)
    free_T, clipped_T = (stats.value - batch.return_T).square(), (clamped_T - batch.return_T).square()
    metrics = {"clipped": (clipped_T > free_T).float(), "value": stats.value}
    return torch.maximum(free_T, clipped_T) / 2, metrics
