"""Sequence parallelism (Ulysses, arXiv 2309.14509): every process has some of the tokens, in attention some heads.

    tokens of this process, all heads --all-to-all--> all tokens, heads of this process: attention --all-to-all--> back

Everything but attention looks at single tokens. Shapes: U tokens, N of them here, S processes, H query heads, K
key/value heads, D head size, A actions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.ops.attention import Attend


class Ulysses:
    """Attention over all U tokens, of which each process of `group` has a part; takes the place of `attend`."""

    def __init__(self, attend: Attend, group: dist.ProcessGroup, num_tokens: int) -> None:
        self.attend, self.group = attend, group
        self.parts = parts(num_tokens, dist.get_world_size(group))
        self.own = self.parts[dist.get_rank(group)]
        """Which of the tokens are here."""

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scaling: float) -> Tensor:
        size, here = len(self.parts), len(query_NHD)
        counts = [len(part) for part in self.parts]
        if key_NKD.shape[1] < size:  # each process needs a key head: that of its query heads
            copies = size // key_NKD.shape[1]
            key_NKD, value_NKD = (x.repeat_interleave(copies, dim=1) for x in (key_NKD, value_NKD))
        by_process = [x.unflatten(1, (size, -1)) for x in (query_NHD, key_NKD, value_NKD)]
        heads = [x.shape[2] for x in by_process]
        sent = torch.cat(by_process, dim=2).transpose(0, 1).flatten(0, 1)
        received = _AllToAll.apply(sent, [here] * size, counts, self.group)
        query_UHD, key_UKD, value_UKD = received.split(heads, dim=1)
        out_UHD = self.attend(layer, query_UHD, key_UKD, value_UKD, scaling)
        back = _AllToAll.apply(out_UHD, counts, [here] * size, self.group)
        return back.unflatten(0, (size, here)).transpose(0, 1).flatten(1)


def parts(number: int, size: int) -> list[range]:
    """`number` things in `size` even runs."""
    return [range(number * i // size, number * (i + 1) // size) for i in range(size)]


def spread(x_N: Tensor, is_mine_A: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What every process of `group` has of A things, each one some of them, whole on each; [N, ...] -> [A, ...].

    All then compute the same from it, so the gradient of a process's own part is its part of the gradient.
    """
    return _Spread.apply(x_N, is_mine_A, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.job = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.job
        return _AllToAll.apply(grad, received, sent, group), None, None, None


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
