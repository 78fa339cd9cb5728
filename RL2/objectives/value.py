"""What a critic minimises: a pure function on action tokens, as all objectives.

Notation: v is the critic's value before the token, v_old what it was when the rollout arrived, R the return.
"""

from __future__ import annotations

import torch

from RL2.objectives.objective import Loss
from RL2.types import TokenBatch, TokenStats


def clipped_value(stats: TokenStats, batch: TokenBatch, *, clip: float) -> Loss:
    """max((v - R)^2, (clamp(v, v_old - clip, v_old + clip) - R)^2) / 2.

    The value loss of PPO's first code (OpenAI Baselines, ppo2), which the paper does not have; studied in arXiv
    2005.12729. Gradient with respect to v: v - R; zero where v has moved further than `clip` away from v_old and is
    nearer to R than the clamped value.
    """
    assert batch.value_T is not None
    assert batch.return_T is not None
    clamped_T = torch.clamp(stats.value, batch.value_T - clip, batch.value_T + clip)
    free_T, clipped_T = (stats.value - batch.return_T).square(), (clamped_T - batch.return_T).square()
    metrics = {"clipped": (clipped_T > free_T).float(), "value": stats.value}
    return torch.maximum(free_T, clipped_T) / 2, metrics
