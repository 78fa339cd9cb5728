"""Triton kernels for `tally`, `gradient` and `count_above` of ops/tally.py; each passes over a tile once.

Shapes as in ops/tally.py: C tokens (rows), W columns of one tile, K extra places. Row offsets are 64-bit: a tile may
hold more than 2^31 logits. Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from RL2.ops.tally import FAR, Slopes, Tally

BLOCK = 4096
"""Columns that one program processes at a time."""

NUM_WARPS = 8


def tally(z_CW: Tensor, start: int, scratch_CW: Tensor, *, with_z: bool, with_sq: bool) -> Tally:
    """Return the same tally as ops/tally.py, without changing the tile or `scratch_CW`."""
    num_rows, width = z_CW.shape
    out = z_CW.new_empty(len(Tally._fields), num_rows)
    if num_rows:
        _tally_kernel[(num_rows,)](
            z_CW,
            z_CW.stride(0),
            width,
            out,
            num_rows,
            start,
            FAR=FAR,
            WITH_Z=with_z,
            WITH_SQ=with_sq,
            BLOCK=_block(width),
            num_warps=NUM_WARPS,
        )
    return Tally(*out.unbind())


def gradient(z_CW: Tensor, start: int, scratch_CW: Tensor, slope: Slopes, dtype: torch.dtype) -> Tensor:
    """Return the same gradient as ops/tally.py, in the tile if `dtype` is its own, else in `scratch_CW`."""
    num_rows, width = z_CW.shape
    g_CW = z_CW if dtype == z_CW.dtype else scratch_CW
    if num_rows:
        block = _block(width)
        _gradient_kernel[(num_rows, triton.cdiv(width, block))](
            z_CW,
            g_CW,
            z_CW.stride(0),
            width,
            start,
            slope.second,
            slope.a,
            slope.a if slope.b is None else slope.b,
            slope.a if slope.c is None else slope.c,
            slope.mode,
            slope.at_mode,
            slope.extra_id.contiguous(),
            slope.extra.contiguous(),
            WITH_B=slope.b is not None,
            WITH_C=slope.c is not None,
            NUM_EXTRA=slope.extra.shape[1],
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return g_CW


def count_above(z_CW: Tensor, start: int, labels_C: Tensor, label_logit_C: Tensor) -> Tensor:
    """Count the columns that precede the label, as in ops/tally.py, int64 [C]."""
    num_rows, width = z_CW.shape
    out_C = torch.zeros_like(labels_C)
    if num_rows:
        _count_kernel[(num_rows,)](
            z_CW,
            z_CW.stride(0),
            width,
            start,
            labels_C,
            label_logit_C,
            out_C,
            BLOCK=_block(width),
            num_warps=NUM_WARPS,
        )
    return out_C


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(width))


@triton.jit
def _tally_kernel(
    z_ptr,
    row_stride,
    width,
    out_ptr,
    num_rows,
    start,
    FAR: tl.constexpr,
    WITH_Z: tl.constexpr,
    WITH_SQ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the running tally of a row with that of each block in turn, as `tally.merge` does."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * row_stride
    infinity = float("inf")
    top = tl.load(z_ptr)  # only for its dtype: the first block sets everything
    sum = top * 0.0
    sum_z, sum_sq = sum, sum
    top, second = sum - infinity, sum - infinity
    mode = 0
    for at in range(0, width, BLOCK):
        column = at + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < width, other=-infinity)
        block_top = tl.max(z, 0)
        block_mode = tl.min(tl.where(z == block_top, column, width), 0)
        z = tl.where(column == block_mode, -infinity, z)
        loser = tl.minimum(top, block_top)
        new_second = tl.maximum(tl.maximum(second, tl.max(z, 0)), loser)
        reference = tl.where(new_second == -infinity, block_top, new_second)
        e = tl.exp(z - reference)
        shift, shift_loser = tl.maximum(second - reference, FAR), tl.maximum(loser - reference, FAR)
        scale, scale_loser = tl.exp(shift), tl.exp(shift_loser)
        if WITH_Z:
            z = tl.where(z == -infinity, 0.0, z - reference)
            sum_z = scale * (sum_z + shift * sum) + tl.sum(e * z, 0) + scale_loser * shift_loser
        if WITH_SQ:
            sum_sq = scale * scale * sum_sq + tl.sum(e * e, 0) + scale_loser * scale_loser
        sum = scale * sum + tl.sum(e, 0) + scale_loser
        mode = tl.where(block_top > top, block_mode, mode)  # the earlier one wins a tie
        top = tl.maximum(top, block_top)
        second = new_second
    tl.store(out_ptr + row, top)
    tl.store(out_ptr + num_rows + row, (mode + start).to(top.dtype))
    tl.store(out_ptr + 2 * num_rows + row, second)
    tl.store(out_ptr + 3 * num_rows + row, sum)
    tl.store(out_ptr + 4 * num_rows + row, sum_z)
    tl.store(out_ptr + 5 * num_rows + row, sum_sq)


@triton.jit
def _gradient_kernel(
    z_ptr,
    g_ptr,
    row_stride,
    width,
    start,
    second_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    mode_ptr,
    at_mode_ptr,
    extra_id_ptr,
    extra_ptr,
    WITH_B: tl.constexpr,
    WITH_C: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    t = tl.load(z_ptr + row * row_stride + column, mask=here, other=0.0) - tl.load(second_ptr + row)
    is_mode = column + start == tl.load(mode_ptr + row)
    t = tl.where(is_mode, 0.0, t)  # its exponential may overflow
    e = tl.exp(t)
    g = tl.load(a_ptr + row) + tl.zeros_like(t)
    if WITH_B:
        g += t * tl.load(b_ptr + row)
    if WITH_C:
        g += e * tl.load(c_ptr + row)
    g = tl.where(is_mode, tl.load(at_mode_ptr + row), g * e)
    for k in range(NUM_EXTRA):
        is_extra = column + start == tl.load(extra_id_ptr + row * NUM_EXTRA + k)
        g += tl.where(is_extra, tl.load(extra_ptr + row * NUM_EXTRA + k), 0.0)
    tl.store(g_ptr + row * width + column, g.to(g_ptr.dtype.element_ty), mask=here)


@triton.jit
def _count_kernel(z_ptr, row_stride, width, start, labels_ptr, label_logit_ptr, out_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * row_stride
    label, label_logit = tl.load(labels_ptr + row), tl.load(label_logit_ptr + row)
    count = 0
    for at in range(0, width, BLOCK):
        column = at + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < width, other=-float("inf"))
        before = (z > label_logit) | ((z == label_logit) & (column + start < label))
        count += tl.sum(before.to(tl.int32), 0)
    tl.store(out_ptr + row, count)
