"""Trajectories into one packed batch, weights, and the plan of who computes what: pure functions, run on every rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence as Seq
from typing import Literal

import torch
from torch import Tensor

from RL2.advantages import reward_of_sequences
from RL2.types import TokenBatch, Trajectory


def pack(trajectories: Seq[Trajectory]) -> TokenBatch:
    """All sequences of `trajectories` end to end; labels are shifted here and never again."""
    sequences = [(n, t.group, s) for n, t in enumerate(trajectories) for s in t.sequences]
    if not sequences:
        raise ValueError("nothing to pack: no trajectory has a sequence")
    lengths = [len(s.token_ids) - 1 for _, _, s in sequences]

    def joined(name: Literal["token_ids", "action_mask", "logps", "rewards"], dtype: torch.dtype, shift: int) -> Tensor:
        parts = (getattr(s, name)[shift : len(s.token_ids) - 1 + shift] for _, _, s in sequences)
        return torch.tensor([x for part in parts for x in part], dtype=dtype)

    return TokenBatch(
        token_ids_T=joined("token_ids", torch.long, 0),
        labels_T=joined("token_ids", torch.long, 1),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        action_T=joined("action_mask", torch.bool, 1),
        reward_T=joined("rewards", torch.float32, 1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        trajectory_B=torch.tensor([n for n, _, _ in sequences]),
        group_B=torch.tensor([group for _, group, _ in sequences]),
        engine_logp_T=joined("logps", torch.float32, 1),
    )


def loss_weights(
    batch: TokenBatch,
    *,
    train_on: Literal["all", "correct"],
    level: Literal["token", "sequence"],
    average_over: Literal["all", "kept"],
) -> Tensor:
    """weight_T of every token in the loss, float32 [T]; `(loss_T * weight_T).sum()` is then the mean that is asked for.

    `batch` is the global minibatch of one optimizer step. `train_on=correct` keeps the sequences of trajectories
    whose total reward is above 0. `level=token`: each token weighs 1 / (number of tokens); `sequence`: 1 / (tokens of
    its sequence) / (number of sequences). The numbers count everything (`average_over=all`, thesis 3.1) or only what
    is kept (`kept`, 3.2). With nothing kept all weights are 0.
    """
    sequence_T, action_T = batch.sequence_T, batch.action_T
    kept_B = reward_of_sequences(batch) > 0 if train_on == "correct" else batch.trajectory_B >= 0
    tokens_B = torch.zeros_like(batch.lengths_B).index_add_(0, sequence_T, action_T.long())
    counted_B = (kept_B if average_over == "kept" else torch.ones_like(kept_B)) & (tokens_B > 0)
    if level == "token":
        total = max(1, int(tokens_B[counted_B].sum()))
        weight_B = kept_B.double() / total
    else:
        weight_B = kept_B.double() / tokens_B.clamp(min=1) / max(1, int(counted_B.sum()))
    return (weight_B[sequence_T] * action_T).float()


def minibatches(batch: TokenBatch, number: int) -> list[list[int]]:
    """The sequences of each of `number` optimizer steps on one rollout: trajectories in order, cut into even shares.

    With fewer trajectories than steps (most were filtered out or unscored) there is one step a trajectory.
    """
    trajectory = batch.trajectory_B.tolist()
    order = {t: i for i, t in enumerate(dict.fromkeys(trajectory))}
    number = min(number, len(order))
    shares: list[list[int]] = [[] for _ in range(number)]
    for b, t in enumerate(trajectory):
        shares[order[t] * number // len(order)].append(b)
    return shares


def units(batch: TokenBatch, ids: Seq[int], max_tokens: int) -> list[list[int]]:
    """`ids` in lists that stay together: sequences of one group, as far as `max_tokens` allow.

    They begin alike, and in one microbatch what they share is computed once.
    """
    lengths, groups = batch.lengths_B.tolist(), batch.group_B.tolist()
    found: list[list[int]] = []
    room: dict[int, tuple[list[int], int]] = {}
    for b in ids:
        unit, left = room.get(groups[b], ([], 0))
        if lengths[b] > left:
            unit, left = [], max_tokens
            found.append(unit)
        unit.append(b)
        room[groups[b]] = unit, left - lengths[b]
    return found


def microbatches(batch: TokenBatch, ids: Seq[int], max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """[rank][microbatch] -> which of the sequences `ids`: `plan` over their `units`."""
    together = units(batch, ids, max_tokens)
    lengths = [int(batch.lengths_B[unit].sum()) for unit in together]
    return [
        [[b for i in chosen for b in together[i]] for chosen in rank] for rank in plan(lengths, max_tokens, num_ranks)
    ]


def plan(lengths: Seq[int], max_tokens: int, num_ranks: int) -> list[list[list[int]]]:
    """[rank][microbatch] -> ids of the sequences: at most `max_tokens` each, even, and few.

    Every rank gets the same number of microbatches (some may be empty), so every rank runs the same collectives.
    Longest first, each into the emptiest microbatch. Raises ValueError if one sequence alone is too long.
    """
    if lengths and max(lengths) > max_tokens:
        raise ValueError(
            f"a sequence of {max(lengths) + 1} tokens does not fit into a microbatch of {max_tokens}; "
            "raise actor.max_length_per_device (and actor.max_inference_length_per_device)"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = max(1, math.ceil(sum(lengths) / (max_tokens * num_ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * num_ranks)]
        heap = [(0, i) for i in range(len(bins))]
        for sequence in order:
            load, i = heapq.heappop(heap)
            bins[i].append(sequence)
            heapq.heappush(heap, (load + lengths[sequence], i))
        if max(heap)[0] <= max_tokens:
            return [[sorted(ids) for ids in bins[rank::num_ranks]] for rank in range(num_ranks)]
        per_rank += 1
