"""Sequence parallelism (Ulysses, arXiv 2309.14509): each process holds some tokens, and in attention some heads.

    tokens of this process, all heads --all-to-all--> all tokens, heads of this process: attention --all-to-all--> back

Everything except attention acts on single tokens. Shapes: U tokens, N of them here, S processes, H query heads, K
key/value heads, D head size, E value size, A actions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from RL2.ops.attention import Attend
from RL2.ops.causal_attention import Scoring
from RL2.parallel.collectives import all_to_all


class Ulysses:
    """Attention over all U tokens, of which each process of `group` holds a part; a replacement for `attend`."""

    def __init__(self, attend: Attend, group: dist.ProcessGroup, num_tokens: int) -> None:
        self.attend, self.group = attend, group
        self.parts = parts(num_tokens, dist.get_world_size(group))
        self.own = self.parts[dist.get_rank(group)]
        """Range of the tokens on this process."""

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scoring: Scoring) -> Tensor:
        size, here = len(self.parts), len(query_NHD)
        counts = [len(part) for part in self.parts]
        if key_NKD.shape[1] < size:  # each process needs the key head of its query heads
            copies = size // key_NKD.shape[1]
            key_NKD, value_NKD = (x.repeat_interleave(copies, dim=1) for x in (key_NKD, value_NKD))
        value_size = value_NKD.shape[2]
        value_NKD = F.pad(value_NKD, (0, key_NKD.shape[2] - value_size))  # sent in one tensor
        by_process = [x.unflatten(1, (size, -1)) for x in (query_NHD, key_NKD, value_NKD)]
        heads = [x.shape[2] for x in by_process]
        sent = torch.cat(by_process, dim=2).transpose(0, 1).flatten(0, 1)
        received = all_to_all(sent, [here] * size, counts, self.group)
        query_UHD, key_UKD, value_UKD = received.split(heads, dim=1)
        value_UKE = value_UKD[:, :, :value_size]
        if scoring.sink_H is not None:
            scoring = scoring._replace(sink_H=scoring.sink_H.unflatten(0, (size, -1))[dist.get_rank(self.group)])
        out_UHD = self.attend(layer, query_UHD, key_UKD, value_UKE, scoring)
        back = all_to_all(out_UHD, counts, [here] * size, self.group)
        return back.unflatten(0, (size, here)).transpose(0, 1).flatten(1)


def parts(number: int, size: int) -> list[range]:
    """Split `number` items into `size` even ranges."""
    return [range(number * i // size, number * (i + 1) // size) for i in range(size)]


def spread(x_N: Tensor, is_mine_A: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Combine the rows that each process of `group` holds into the whole, on each; [N, ...] -> [A, ...].

    All processes then compute the same from it, so the gradient of a process's own rows is its part of the gradient.
    """
    return _Spread.apply(x_N, is_mine_A, group)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, is_mine_A: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(is_mine_A)
        out = x_N.new_zeros(len(is_mine_A), *x_N.shape[1:])
        out[is_mine_A] = x_N
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad_A: Tensor) -> tuple[Tensor | None, ...]:
        (is_mine_A,) = ctx.saved_tensors
        return grad_A[is_mine_A], None, None
