"""From logits to tokens: one draw a row, each from its own request's random numbers.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sample(
    logits_RV: Tensor, temperature_R: Tensor, top_p_R: Tensor, top_k_R: Tensor, uniform_R: Tensor
) -> tuple[Tensor, Tensor]:
    """A token a row and its log-probability under the distribution that it was drawn from.

    The distribution is softmax(logits / temperature), cut to the `top_k` most likely tokens (0: all) and to the
    smallest set with probability of at least `top_p`, and normalised again. Temperature 0 takes the most likely token
    and gives its log-probability under the model. The draw inverts the cumulative distribution at `uniform_R` in [0,
    1).
    """
    greedy_R = temperature_R == 0
    logits_RV = logits_RV.float() / torch.where(greedy_R, 1.0, temperature_R)[:, None]
    logp_RV = logits_RV.log_softmax(-1)
    if bool(((top_k_R > 0) | (top_p_R < 1)).any()):
        logp_RV = _truncated(logp_RV, torch.where(greedy_R, 1.0, top_p_R), torch.where(greedy_R, 0, top_k_R))
    cumulative_RV = logp_RV.exp().cumsum(-1, dtype=torch.float64)
    target_R1 = (uniform_R * cumulative_RV[:, -1])[:, None]
    ids_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0].clamp(max=logits_RV.shape[1] - 1)
    if bool(greedy_R.any()):
        ids_R = torch.where(greedy_R, logp_RV.argmax(-1), ids_R)
    return ids_R, logp_RV.gather(1, ids_R[:, None])[:, 0]


def _truncated(logp_RV: Tensor, top_p_R: Tensor, top_k_R: Tensor) -> Tensor:
    sorted_RV, order_RV = torch.sort(logp_RV, dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.exp().cumsum(-1) - sorted_RV.exp()  # probability of all that is more likely
    rank_RV = torch.arange(logp_RV.shape[1], device=logp_RV.device).expand_as(logp_RV)
    cut_RV = ((top_p_R < 1)[:, None] & (before_RV >= top_p_R[:, None])) | (
        (top_k_R > 0)[:, None] & (rank_RV >= top_k_R[:, None])
    )
    cut_RV[:, 0] = False
    kept_RV = torch.zeros_like(logp_RV).scatter(1, order_RV, sorted_RV.masked_fill(cut_RV, -torch.inf))
    return kept_RV.log_softmax(-1)


def uniforms(seeds: list[int], positions: list[int]) -> np.ndarray:
    """A number in [0, 1) for each (request seed, position), the same whatever else is in the batch.

    SplitMix64 (Steele, Lea and Flood 2014) of seed and position, one vectorised pass.
    """
    with np.errstate(over="ignore"):
        x = np.array(seeds, dtype=np.uint64)
        x = _mix(x) + np.array(positions, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(x) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
