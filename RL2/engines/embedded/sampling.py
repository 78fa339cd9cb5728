"""Sample tokens from logits: one draw per row, with random numbers of its own request.

Shapes: R rows, V vocabulary, B blocks of W tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024
"""Tokens in a block: the draw first finds the block, then the token in it."""


def sample(
    logits_RV: Tensor, temperature_R: Tensor, top_p_R: Tensor, top_k_R: Tensor, min_p_R: Tensor, uniform_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row; return the tokens and their log-probabilities under the sampling distribution.

    The distribution is softmax(logits / temperature), cut to the tokens with at least `min_p` times the probability of
    the most likely one (0: all), then to the `top_k` most likely tokens (0: all), then to the smallest set of these
    with probability of at least `top_p`, and normalised after each, in the order of vLLM. Temperature 0 takes the most
    likely token and returns its log-probability under the model.
    The draw inverts the cumulative distribution at `uniform_R` in [0, 1). Parameters and `uniform_R` are on the CPU, so
    that no branch waits for the GPU.
    """
    device = logits_RV.device
    greedy_R = temperature_R == 0
    distinct = set(temperature_R.tolist())
    is_cut, has_floor = min(top_p_R.tolist()) < 1 or max(top_k_R.tolist()) > 0, max(min_p_R.tolist()) > 0
    if distinct <= {0, 1}:  # saves a pass over all logits
        logp_RV = logits_RV.log_softmax(-1, dtype=torch.float32)
    else:
        temperature_R1 = torch.where(greedy_R, 1.0, temperature_R).to(device)[:, None]
        logp_RV = (logits_RV.float() / temperature_R1).log_softmax(-1)
    if has_floor:
        floor_R1 = torch.where(greedy_R, 0.0, min_p_R).to(device).log()[:, None] + logp_RV.amax(-1, keepdim=True)
        logp_RV = logp_RV.masked_fill(logp_RV < floor_R1, -torch.inf).log_softmax(-1)
    if is_cut:
        top_p_R, top_k_R = torch.where(greedy_R, 1.0, top_p_R), torch.where(greedy_R, 0, top_k_R)
        logp_RV = _truncated(logp_RV, top_p_R.to(device), top_k_R.to(device))
    ids_R = _draw(logp_RV.exp(), uniform_R.to(device))
    if 0 in distinct:
        ids_R = torch.where(greedy_R.to(device), logp_RV.argmax(-1), ids_R)
    return ids_R, logp_RV.gather(1, ids_R[:, None])[:, 0]


def _draw(p_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Return the tokens at which the cumulative sum of p exceeds `uniform_R` of its total.

    The search finds a block first, then the token in it: sums need double precision to be compared, but for the whole
    vocabulary that would be most of the work.
    """
    vocabulary, width = p_RV.shape[1], BLOCK
    if vocabulary <= BLOCK:
        cumulative_RV = p_RV.cumsum(-1, dtype=torch.float64)
        return _first_above(cumulative_RV, (uniform_R * cumulative_RV[:, -1])[:, None])[:, 0]
    if vocabulary % width and math.gcd(vocabulary, BLOCK) >= BLOCK // 16:  # smaller blocks avoid a padded copy
        width = math.gcd(vocabulary, BLOCK)
    if vocabulary % width:
        p_RV = F.pad(p_RV, (0, -vocabulary % width))
    p_RBW = p_RV.unflatten(1, (-1, width))
    block_RB = p_RBW.sum(-1, dtype=torch.float64).cumsum(-1)
    target_R1 = (uniform_R * block_RB[:, -1])[:, None]
    b_R1 = _first_above(block_RB, target_R1)
    before_R1 = F.pad(block_RB, (1, 0)).gather(1, b_R1)
    p_RW = p_RBW.gather(1, b_R1[:, :, None].expand(-1, -1, width))[:, 0]
    w_R1 = _first_above(p_RW.cumsum(-1, dtype=torch.float64), target_R1 - before_R1)
    return (b_R1 * width + w_R1)[:, 0]


def _first_above(cumulative_RN: Tensor, target_R1: Tensor) -> Tensor:
    """Return the first index, [R, 1], at which a sum exceeds the target; the sum grows there despite rounding."""
    found_R1 = torch.searchsorted(cumulative_RN, target_R1, right=True)
    last_R1 = torch.searchsorted(cumulative_RN, cumulative_RN[:, -1:].contiguous())
    return torch.minimum(found_R1, last_R1).clamp(max=cumulative_RN.shape[1] - 1)  # NaN exceeds nothing


def _truncated(logp_RV: Tensor, top_p_R: Tensor, top_k_R: Tensor) -> Tensor:
    sorted_RV, order_RV = torch.sort(logp_RV, dim=-1, descending=True, stable=True)
    rank_RV = torch.arange(logp_RV.shape[1], device=logp_RV.device).expand_as(logp_RV)
    beyond_k_RV = (top_k_R > 0)[:, None] & (rank_RV >= top_k_R[:, None])
    p_RV = sorted_RV.masked_fill(beyond_k_RV, -torch.inf).softmax(-1)
    before_RV = p_RV.cumsum(-1) - p_RV  # probability of all more likely tokens
    cut_RV = beyond_k_RV | ((top_p_R < 1)[:, None] & (before_RV >= top_p_R[:, None]))
    cut_RV[:, 0] = False
    kept_RV = torch.zeros_like(logp_RV).scatter(1, order_RV, sorted_RV.masked_fill(cut_RV, -torch.inf))
    return kept_RV.log_softmax(-1)


def uniforms(seeds: list[int], positions: list[int]) -> np.ndarray:
    """Return a number in [0, 1) for each (request seed, position), independent of the rest of the batch.

    It is SplitMix64 (Steele, Lea and Flood 2014) of seed and position, in one vectorised pass.
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
