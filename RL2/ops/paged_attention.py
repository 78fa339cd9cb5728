"""Triton kernels for attention of one new token per row over paged keys and values.

A row's earlier positions are split into parts of fixed size, one program each; a second kernel joins the parts (split
keys as in Flash-Decoding, Dao and others 2023). The split depends only on the position, so a row's result does not
depend on the other rows.

Shapes: R rows, H query heads, K key/value heads, G = H / K, D head size, E value size, N pages of `PAGE` positions, P
pages of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from RL2.ops.causal_attention import Scoring

PAGE = 64
"""Positions per page; one step of a program reads one page."""
PART_PAGES = 8
"""Pages per part."""
LOG2_E = 1.4426950408889634
"""Factor of scores in the kernels, which use powers of two."""


def attend(
    query_RHD: Tensor, key_SKD: Tensor, value_SKE: Tensor, table_RP: Tensor, position_R: Tensor, scoring: Scoring
) -> Tensor:
    """Return the attention of each row over its positions up to `position_R[r]` that are in the window, [R, H, E].

    Position s of row r is in page `table_RP[r, s // PAGE]`, int32. `key_SKD` and `value_SKE` hold all pages, S = N *
    PAGE. P must be a multiple of `PART_PAGES`. Nothing outside a row's window is read, and nothing waits for the GPU.
    """
    num_rows, heads, size = query_RHD.shape
    kv_heads, num_parts = key_SKD.shape[1], table_RP.shape[1] // PART_PAGES
    value_size = value_SKE.shape[2]
    query_RHD = query_RHD.contiguous()
    out_RHE = query_RHD.new_empty((num_rows, heads, value_size))
    part_RHPE = query_RHD.new_empty((num_rows, heads, num_parts, value_size), dtype=torch.float32)
    weight_RHP = query_RHD.new_empty((num_rows, heads, num_parts), dtype=torch.float32)
    block_d, block_e = (max(16, triton.next_power_of_2(number)) for number in (size, value_size))
    groups = heads // kv_heads
    window = scoring.window or 2**30
    _part_kernel[(num_rows, kv_heads, num_parts)](
        query_RHD,
        key_SKD,
        value_SKE,
        table_RP,
        table_RP.stride(0),
        position_R,
        position_R.stride(0),
        part_RHPE,
        weight_RHP,
        scoring.scaling * LOG2_E,
        (scoring.softcap or 0.0) * LOG2_E,
        window,
        kv_heads,
        HAS_SOFTCAP=scoring.softcap is not None,
        GROUPS=groups,
        SIZE=size,
        VALUE_SIZE=value_size,
        PARTS=num_parts,
        PAGE=PAGE,
        PART_PAGES=PART_PAGES,
        BLOCK_G=max(16, triton.next_power_of_2(groups)),
        BLOCK_D=block_d,
        BLOCK_E=block_e,
        num_warps=4,
    )
    _join_kernel[(num_rows, heads)](
        part_RHPE,
        weight_RHP,
        out_RHE,
        position_R,
        position_R.stride(0),
        window,
        out_RHE if scoring.sink_H is None else scoring.sink_H.float() * LOG2_E,
        HAS_SINKS=scoring.sink_H is not None,
        VALUE_SIZE=value_size,
        PARTS=num_parts,
        PART=PAGE * PART_PAGES,
        BLOCK_E=block_e,
    )
    return out_RHE


@triton.jit
def _part_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    table_stride,
    position_ptr,
    position_stride,
    part_ptr,
    weight_ptr,
    scaling,
    softcap,
    window,
    kv_heads,
    HAS_SOFTCAP: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PAGE: tl.constexpr,
    PART_PAGES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(position_ptr + row * position_stride).to(tl.int32) + 1
    first = tl.maximum(length - window, 0)  # position that is visible
    begin = part * PAGE * PART_PAGES
    if (begin < length) & (begin + PAGE * PART_PAGES > first):
        g, d, n = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, PAGE)
        e = tl.arange(0, BLOCK_E)
        is_head, is_size, is_value = g < GROUPS, d < SIZE, e < VALUE_SIZE
        head_G = (row * kv_heads + kv_head) * GROUPS + g  # among all rows' heads
        query_GD = tl.load(
            query_ptr + head_G[:, None] * SIZE + d[None, :], mask=is_head[:, None] & is_size[None, :], other=0.0
        )
        best_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
        total_G = tl.zeros([BLOCK_G], tl.float32)
        out_GE = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
        num_pages = tl.minimum(PART_PAGES, tl.cdiv(length - begin, PAGE))
        for i in range(tl.maximum(first - begin, 0) // PAGE, num_pages):
            page = tl.load(table_ptr + row * table_stride + part * PART_PAGES + i).to(tl.int64)
            is_there = (begin + i * PAGE + n < length) & (begin + i * PAGE + n >= first)
            at_N1 = ((page * PAGE + n) * kv_heads + kv_head)[:, None]
            mask_ND, mask_NE = is_there[:, None] & is_size[None, :], is_there[:, None] & is_value[None, :]
            key_ND = tl.load(key_ptr + at_N1 * SIZE + d[None, :], mask=mask_ND, other=0.0)
            value_NE = tl.load(value_ptr + at_N1 * VALUE_SIZE + e[None, :], mask=mask_NE, other=0.0)
            score_GN = tl.dot(query_GD, tl.trans(key_ND), input_precision="ieee") * scaling
            if HAS_SOFTCAP:  # tanh(x) = 2 sigmoid(2 x) - 1
                score_GN = softcap * (2 * tl.sigmoid(2 * score_GN / softcap) - 1)
            score_GN = tl.where(is_there[None, :], score_GN, float("-inf"))
            new_G = tl.maximum(best_G, tl.max(score_GN, 1))
            share_GN = tl.exp2(score_GN - new_G[:, None])
            shrink_G = tl.exp2(best_G - new_G)
            total_G = total_G * shrink_G + tl.sum(share_GN, 1)
            out_GE = out_GE * shrink_G[:, None] + tl.dot(share_GN.to(value_NE.dtype), value_NE, input_precision="ieee")
            best_G = new_G
        at_G = head_G * PARTS + part
        tl.store(
            part_ptr + at_G[:, None] * VALUE_SIZE + e[None, :],
            out_GE / total_G[:, None],
            mask=is_head[:, None] & is_value[None, :],
        )
        tl.store(weight_ptr + at_G, best_G + tl.log2(total_G), mask=is_head)


@triton.jit
def _join_kernel(
    part_ptr,
    weight_ptr,
    out_ptr,
    position_ptr,
    position_stride,
    window,
    sink_ptr,
    HAS_SINKS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(position_ptr + row * position_stride).to(tl.int32) + 1
    first = tl.maximum(length - window, 0)
    e = tl.arange(0, BLOCK_E)
    best = float("-inf")
    total = 0.0
    if HAS_SINKS:
        best = tl.load(sink_ptr + head)
        total = 1.0
    head = row * tl.num_programs(1) + head
    out_E = tl.zeros([BLOCK_E], tl.float32)
    for part in range(first // PART, tl.cdiv(length, PART)):
        weight = tl.load(weight_ptr + head * PARTS + part)
        new = tl.maximum(best, weight)
        shrink, share = tl.exp2(best - new), tl.exp2(weight - new)
        part_E = tl.load(part_ptr + (head * PARTS + part) * VALUE_SIZE + e, mask=e < VALUE_SIZE, other=0.0)
        total = total * shrink + share
        out_E = out_E * shrink + share * part_E
        best = new
    tl.store(out_ptr + head * VALUE_SIZE + e, (out_E / total).to(out_ptr.dtype.element_ty), mask=e < VALUE_SIZE)
