"""Pack trajectories into one batch, weigh its tokens, and plan microbatches: pure functions, run on every rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from RL2.batch.advantages import reward_of_sequences
from RL2.batch.selection import within_second_moment, without_covariance
from RL2.types import Sequence, TokenBatch, Trajectory

Field = Literal["token_ids", "action_mask", "logps", "rewards", "versions"]


def pack(trajectories: Seq[Trajectory], version: int | None = None) -> TokenBatch:
    """Return all sequences of `trajectories` end to end. Labels are shifted here and never again.

    `version` is that of the weights that will train; the ages of tokens count from it. Each role has groups of its own.
    """
    sequences = [(n, s) for n, t in enumerate(trajectories) for s in t.sequences]
    if not sequences:
        raise ValueError("nothing to pack: no trajectory has a sequence")
    lengths = [len(s) - 1 for _, s in sequences]
    roles = sorted({t.role for t in trajectories if t.role is not None})
    role_N = [roles.index(t.role) if t.role in roles else 0 for t in trajectories]
    group_N = [t.group * max(1, len(roles)) + role for t, role in zip(trajectories, role_N, strict=True)]

    def joined(name: Field, dtype: type[np.generic], shift: int) -> Tensor:
        parts = [getattr(s, name)[shift : len(s) - 1 + shift] for _, s in sequences]
        return torch.from_numpy(np.concatenate(parts, dtype=dtype))

    age_T = None
    if version is not None and all(len(s.versions) for _, s in sequences):
        sampled_by_T = joined("versions", np.int64, 1)
        age_T = torch.where(sampled_by_T < 0, 0, version - sampled_by_T)
    truncated_B = torch.tensor([trajectories[n].truncated for n, _ in sequences])
    experts = [s.experts for _, s in sequences if s.experts is not None]
    return TokenBatch(
        token_ids_T=joined("token_ids", np.int64, 0),
        labels_T=joined("token_ids", np.int64, 1),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]),
        action_T=joined("action_mask", np.bool_, 1),
        reward_T=joined("rewards", np.float32, 1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        trajectory_B=torch.tensor([n for n, _ in sequences]),
        group_B=torch.tensor([group_N[n] for n, _ in sequences]),
        truncated_B=truncated_B if truncated_B.any() else None,
        role_B=torch.tensor([role_N[n] for n, _ in sequences]) if roles else None,
        engine_logp_T=joined("logps", np.float32, 1),
        age_T=age_T if age_T is not None and age_T.any() else None,
        experts_T=torch.cat(experts) if len(experts) == len(sequences) else None,
    )


def pack_arrays(
    ids_B: Seq[np.ndarray], action_B: Seq[np.ndarray], reward_B: Seq[float], group_B: Seq[int]
) -> TokenBatch:
    """Return a batch with one sequence per trajectory, as `pack` does, for sequences that no engine sampled.

    `action_B` marks the actions among the tokens `ids_B`; `reward_B` has the reward at the last token.
    """
    lengths = np.array([len(ids) - 1 for ids in ids_B])
    reward_T = torch.zeros(int(lengths.sum()))
    reward_T[torch.from_numpy(lengths.cumsum() - 1)] = torch.tensor(reward_B, dtype=torch.float32)
    return TokenBatch(
        token_ids_T=torch.from_numpy(np.concatenate([ids[:-1] for ids in ids_B]).astype(np.int64)),
        labels_T=torch.from_numpy(np.concatenate([ids[1:] for ids in ids_B]).astype(np.int64)),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        action_T=torch.from_numpy(np.concatenate([action[1:] for action in action_B])),
        reward_T=reward_T,
        cu_seqlens=torch.tensor([0, *lengths.tolist()]).cumsum(0),
        trajectory_B=torch.arange(len(ids_B)),
        group_B=torch.tensor(group_B),
        engine_logp_T=torch.zeros_like(reward_T),
    )


def part_rewards(trajectories: Seq[Trajectory], weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return the parts of the reward of each trajectory, float64 [N, P], and their weights [P].

    A part that a trajectory lacks is 0.
    """
    names = sorted({name for trajectory in trajectories for name in trajectory.by_part})
    rows = [[trajectory.by_part.get(name, 0.0) for name in names] for trajectory in trajectories]
    weight_P = torch.tensor([weights.get(name, 1.0) for name in names], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64).reshape(len(trajectories), len(names)), weight_P


def pack_tokens(sequences: Seq[list[int]]) -> TokenBatch:
    """Return a batch of token ids: all but the first of a sequence are actions, and each sequence is a group."""
    return pack(
        [
            Trajectory(n, n, 0, [Sequence(ids, [False] + [True] * (len(ids) - 1), [0.0] * len(ids), [0.0] * len(ids))])
            for n, ids in enumerate(sequences)
        ]
    )


def loss_weights(
    batch: TokenBatch,
    *,
    train_on: Literal["all", "correct"] = "all",
    level: Literal["token", "sequence", "constant"] = "token",
    average_over: Literal["all", "kept", "correct"] = "all",
    length: int | None = None,
    entropy_quantile: float = 0.0,
    not_mode: bool = False,
    on_policy: bool = False,
    not_truncated: bool = False,
    second_moment: float | None = None,
    covariance_share: float = 0.0,
    covariance_low: float = 1.0,
    covariance_high: float = 5.0,
) -> Tensor:
    """Return weight_T of every token, float32 [T], so that `(loss_T * weight_T).sum()` is the configured mean.

    `batch` is the global minibatch of one optimizer step. The tokens that `kept` keeps train. With `level=token` each
    weighs 1 / (number of tokens); `sequence`: 1 / (tokens of its sequence) / (number of sequences); `constant`:
    1 / `length` / (number of sequences), as in Dr. GRPO (arXiv 2503.20783). The numbers count every action
    (`average_over=all`, thesis 3.1), the tokens that train (`kept`, 3.2) or every action of the sequences that
    `train_on` keeps (`correct`). If nothing is kept, all weights are 0.

    In a tree of responses a token counts, and weighs, `share_T`; a tree is one sequence. `level=sequence` has no trees.
    """
    sequence_T = batch.sequence_T
    kept_T = kept(
        batch,
        train_on=train_on,
        entropy_quantile=entropy_quantile,
        not_mode=not_mode,
        on_policy=on_policy,
        not_truncated=not_truncated,
        second_moment=second_moment,
        covariance_share=covariance_share,
        covariance_low=covariance_low,
        covariance_high=covariance_high,
    )
    counted_T = {"all": batch.action_T, "kept": kept_T}.get(average_over)
    if counted_T is None:
        counted_T = kept(batch, train_on=train_on)
    share_T = torch.ones_like(kept_T, dtype=torch.float64) if batch.share_T is None else batch.share_T.double()
    zero_B = share_T.new_zeros(batch.num_sequences)
    tokens_B = zero_B.index_add(0, sequence_T, counted_T * share_T)
    # shares fall along a response, and those at the ends of a tree add up to 1
    ends_B = zero_B.scatter_reduce(0, sequence_T[counted_T], share_T[counted_T], "amin", include_self=False)
    num_sequences = float(ends_B.sum()) or 1.0
    if level == "token":
        weight_B = torch.full_like(tokens_B, 1 / (float(tokens_B.sum()) or 1.0))
    elif level == "sequence":
        weight_B = 1 / tokens_B.clamp(min=1) / num_sequences
    else:
        assert length is not None
        weight_B = torch.full_like(tokens_B, 1 / (length * num_sequences))
    return (weight_B[sequence_T] * share_T * kept_T).float()


def observation_weights(batch: TokenBatch) -> Tensor:
    """Return 1 / (number of observed tokens) at each of them and 0 elsewhere, float32 [T].

    Tokens behind the first action of a sequence that are no actions are observed. `batch` is the global minibatch of
    one optimizer step.
    """
    action_T = batch.action_T.long()
    before_T = action_T.cumsum(0) - action_T
    begun_T = before_T > before_T[batch.cu_seqlens[:-1][batch.sequence_T]]
    observed_T = begun_T & ~batch.action_T
    return (observed_T / observed_T.sum().clamp(min=1).double()).float()


def imitation_weights(batch: TokenBatch) -> Tensor:
    """Return 1 / (number of actions of correct trajectories) at each of them and 0 elsewhere, float32 [T].

    The positive-example loss of VAPO (arXiv 2504.05118) averages over these tokens. `batch` is the global minibatch of
    one optimizer step.
    """
    correct_T = kept(batch, train_on="correct")
    return (correct_T / correct_T.sum().clamp(min=1).double()).float()


def sequence_weights(batch: TokenBatch) -> Tensor:
    """Return weight_T for losses of whole sequences, float32 [T]: 1 / B at the last action of each of B sequences.

    The other weights are 0, so each sequence counts as one trained token. Every sequence has an action.
    """
    place = batch.action_T.nonzero()[:, 0]
    sequence = batch.sequence_T[place]
    last = place[sequence != torch.cat([sequence[1:], sequence.new_tensor([-1])])]
    return torch.zeros_like(batch.reward_T).index_fill_(0, last, 1 / batch.num_sequences)


def nll_factors(batch: TokenBatch) -> Tensor:
    """Return `nll_factor_T` of the global minibatch of one optimizer step, float32 [T].

    It is the number of chosen responses, those with a reward above 0, over the number of their actions.
    """
    chosen_B = reward_of_sequences(batch) > 0
    action_T = batch.action_T & chosen_B[batch.sequence_T]
    return action_T * (chosen_B.sum() / action_T.sum().clamp(min=1)).float()


def kept(
    batch: TokenBatch,
    *,
    train_on: Literal["all", "correct"],
    entropy_quantile: float = 0.0,
    not_mode: bool = False,
    on_policy: bool = False,
    not_truncated: bool = False,
    second_moment: float | None = None,
    covariance_share: float = 0.0,
    covariance_low: float = 1.0,
    covariance_high: float = 5.0,
) -> Tensor:
    """Return which actions train, bool [T], chosen over the whole `batch`.

    `train_on=correct` keeps trajectories whose total reward is above 0. `on_policy` keeps tokens that were sampled by
    the weights that will train, and `not_truncated` trajectories that no length limit ended. Of these, `not_mode` keeps
    tokens that were not the most likely one, and `entropy_quantile` those whose entropy is at or above this quantile
    (arXiv 2506.01939 trains on the top fifth, 0.8), both under the old policy. The last ones to be left out are those
    of `within_second_moment` and `without_covariance` (batch/selection.py).
    """
    kept_T = batch.action_T
    if on_policy and batch.age_T is not None:
        kept_T = kept_T & (batch.age_T == 0)
    if not_truncated and batch.truncated_B is not None:
        kept_T = kept_T & ~batch.truncated_B[batch.sequence_T]
    if train_on == "correct":
        kept_T = kept_T & (reward_of_sequences(batch) > 0)[batch.sequence_T]
    if entropy_quantile > 0 and kept_T.any():
        assert batch.old_entropy_T is not None
        ordered = batch.old_entropy_T[kept_T].sort().values
        threshold = ordered[min(len(ordered) - 1, math.floor(entropy_quantile * len(ordered)))]
        kept_T = kept_T & (batch.old_entropy_T >= threshold)
    if not_mode:
        assert batch.off_mode_T is not None
        kept_T = kept_T & batch.off_mode_T
    if second_moment is not None:
        kept_T = within_second_moment(batch, kept_T, second_moment)
    if covariance_share > 0:
        kept_T = without_covariance(batch, kept_T, covariance_share, covariance_low, covariance_high)
    return kept_T


def minibatches(batch: TokenBatch, number: int) -> list[list[int]]:
    """Return the sequences of each of `number` optimizer steps: trajectories in order, split into even shares.

    With fewer trajectories than steps (most were filtered out or unscored) there is one step for each trajectory.
    """
    trajectory = batch.trajectory_B.tolist()
    order = {t: i for i, t in enumerate(dict.fromkeys(trajectory))}
    number = min(number, len(order))
    shares: list[list[int]] = [[] for _ in range(number)]
    for b, t in enumerate(trajectory):
        shares[order[t] * number // len(order)].append(b)
    return shares


def units(batch: TokenBatch, ids: Seq[int], max_tokens: int) -> list[list[int]]:
    """Split the sequences `ids` into lists that stay together: sequences of one group, up to `max_tokens`.

    Sequences of a group share a prefix, which is computed once in a microbatch. The two sequences of a pair must be in
    one microbatch, because the losses of pairs compare them.
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
    """Return [rank][microbatch] -> sequences among `ids`: the `plan` of their `units`.

    With several teachers, a microbatch has sequences of one, the same on every rank.
    """
    if batch.teacher_B is not None and ids:
        teachers = batch.teacher_B.tolist()
        alike = replace(batch, teacher_B=None)
        parts = [[b for b in ids if teachers[b] == teacher] for teacher in sorted({teachers[b] for b in ids})]
        by_teacher = [microbatches(alike, part, max_tokens, num_ranks) for part in parts]
        return [[one for planned in by_teacher for one in planned[rank]] for rank in range(num_ranks)]
    together = units(batch, ids, max_tokens)
    length_B = batch.lengths_B.tolist()
    lengths = [sum(length_B[b] for b in unit) for unit in together]
    costs = [sum(cost(length_B[b]) for b in unit) for unit in together]
    planned = plan(lengths, max_tokens, num_ranks, costs)
    return [[[b for i in chosen for b in together[i]] for chosen in rank] for rank in planned]


def stand_ins(batch: TokenBatch, planned: Seq[Seq[Seq[int]]]) -> list[int]:
    """Return for each microbatch the sequence that a rank without one runs: the shortest that another rank has there.

    `planned` is [rank][microbatch] -> sequences. It has the teacher of that microbatch.
    """
    lengths = batch.lengths_B.tolist()
    running = ([b for ids in of_ranks for b in ids] for of_ranks in zip(*planned, strict=True))
    return [min(ids or range(len(lengths)), key=lambda b: lengths[b]) for ids in running]


ATTENTION_EQUALS_REST = 16_384
"""Length at which attention takes as long as everything else. In operations it is parameters / (layers x heads x head
size): 10,000 for Qwen3 0.6B, 27,000 for 4B, 62,000 for 32B, 107,000 for Llama 70B. Attention runs at about half
the speed of other matrix products."""


def cost(length: int) -> float:
    """Return the work of a sequence, in tokens of a very short one: linear, plus a quadratic part for attention."""
    return length + length * length / ATTENTION_EQUALS_REST


def plan(lengths: Seq[int], max_tokens: int, num_ranks: int, costs: Seq[float] | None = None) -> list[list[list[int]]]:
    """Return [rank][microbatch] -> sequences: few microbatches of at most `max_tokens`, balanced over ranks.

    Every rank gets the same number of microbatches (some may be empty), so every rank runs the same collectives. Ranks
    wait for each other in each microbatch, so the time of a step is the sum over microbatches of the cost of the
    slowest rank. The better of two ways to fill microbatches is taken (benchmarks/packing.py compares them). `costs`
    defaults to `cost` of each length. Raise ValueError if one sequence is longer than `max_tokens`.
    """
    if lengths and max(lengths) > max_tokens:
        raise ValueError(
            f"a sequence of {max(lengths) + 1} tokens does not fit into a microbatch of {max_tokens}; "
            "raise actor.max_length_per_device (and actor.max_inference_length_per_device)"
        )
    costs = [cost(length) for length in lengths] if costs is None else costs
    number = max(1, math.ceil(sum(lengths) / (max_tokens * num_ranks)))
    while True:
        ways = [fill(lengths, costs, max_tokens, num_ranks, number) for fill in (fill_evenly, fill_in_turn)]
        if found := [rounds for rounds in ways if rounds is not None]:
            rounds = min(found, key=lambda rounds: time_of(rounds, costs))
            return [[sorted(bins[rank]) for bins in rounds] for rank in range(num_ranks)]
        number += 1


Rounds = list[list[list[int]]]
"""Sequences by microbatch and rank."""


def fill_evenly(lengths: Seq[int], costs: Seq[float], max_tokens: int, num_ranks: int, number: int) -> Rounds | None:
    """Fill all `number` microbatches of all ranks evenly: the most expensive sequence first, into the cheapest bin.

    Microbatches of similar cost then run at the same time. Return None if the sequences do not fit.
    """
    bins, left = _fill(_most_expensive_first(costs), lengths, costs, max_tokens, num_ranks * number)
    bins.sort(key=lambda ids: -sum(costs[i] for i in ids))
    return None if left else [bins[i : i + num_ranks] for i in range(0, len(bins), num_ranks)]


def fill_in_turn(lengths: Seq[int], costs: Seq[float], max_tokens: int, num_ranks: int, number: int) -> Rounds | None:
    """Fill one microbatch of all ranks after the other, each up to an even share of the cost.

    The limit is the cost of the most expensive sequence if that is more, so sequences far above an even share run at
    the same time. Return None if the sequences do not fit.
    """
    left, rounds = _most_expensive_first(costs), []
    for remaining in range(number, 0, -1):
        share = sum(costs[i] for i in left) / (num_ranks * remaining)
        level = max([share, *(costs[i] for i in left[:1])]) if remaining > 1 else math.inf
        bins, left = _fill(left, lengths, costs, max_tokens, num_ranks, level)
        rounds.append(bins)
    return None if left else rounds


def time_of(rounds: Rounds, costs: Seq[float]) -> float:
    """Return the sum over microbatches of the cost of the slowest rank."""
    return sum(max(sum(costs[i] for i in ids) for ids in bins) for bins in rounds)


def _fill(
    ids: Seq[int], lengths: Seq[int], costs: Seq[float], max_tokens: int, number: int, level: float = math.inf
) -> tuple[list[list[int]], list[int]]:
    """Put `ids`, in order, each into the cheapest of `number` bins with room, up to a cost of `level`.

    Return the bins, and the sequences that are left.
    """
    bins: list[list[int]] = [[] for _ in range(number)]
    tokens = [0] * number
    heap, left = [(0.0, i) for i in range(number)], []
    for sequence in ids:
        full = []
        while heap and tokens[heap[0][1]] + lengths[sequence] > max_tokens:
            full.append(heapq.heappop(heap))
        if heap and heap[0][0] + costs[sequence] <= level:
            load, i = heap[0]
            bins[i].append(sequence)
            tokens[i] += lengths[sequence]
            heapq.heapreplace(heap, (load + costs[sequence], i))
        else:
            left.append(sequence)
        for entry in full:
            heapq.heappush(heap, entry)
    return bins, left


def _most_expensive_first(costs: Seq[float]) -> list[int]:
    return sorted(range(len(costs)), key=lambda i: (-costs[i], i))
