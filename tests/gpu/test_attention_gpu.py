"""Sliding windows, soft caps and sinks on a GPU: the kernels against the same attention in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

from RL2.ops import paged_attention
from RL2.ops.attention import PackedAttention, attend_to_earlier
from RL2.ops.causal_attention import Scoring, causal_attention

LENGTHS = (5, 300, 64, 129, 1000)
SINK_H = torch.tensor([0.5, -1.0, 2.0, 0.0])
SCORINGS = (
    Scoring(0.1),
    Scoring(0.1, window=1),
    Scoring(0.1, window=64),
    Scoring(0.1, window=500),
    Scoring(0.1, window=64, softcap=2.0),
    Scoring(0.1, window=64, sink_H=SINK_H),
)


def on_gpu(scoring: Scoring) -> Scoring:
    return scoring if scoring.sink_H is None else scoring._replace(sink_H=scoring.sink_H.to("cuda"))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_packed_attention_in_half_precision(scoring: Scoring) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((sum(LENGTHS), 4, 64), (sum(LENGTHS), 2, 64), (sum(LENGTHS), 2, 64))
    inputs = [torch.randn(shape, generator=g).bfloat16() for shape in shapes]
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
        own = on_gpu(scoring) if device == "cuda" else scoring
        out = PackedAttention(cu_seqlens.to(device))(0, leaves[0], leaves[1], leaves[2], own)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    for ours, right in zip(*results, strict=True):
        assert (ours.cpu().float() - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_later_piece_of_a_prompt(scoring: Scoring) -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=g) for shape in ((70, 4, 64), (400, 2, 64), (400, 2, 64)))
    ours = attend_to_earlier(*(x.bfloat16().to("cuda") for x in (query, key, value)), on_gpu(scoring)).cpu()
    right = causal_attention(*(x.transpose(0, 1)[None] for x in (query, key, value)), scoring)[0]
    right = right.transpose(0, 1).flatten(1)
    assert (ours.float() - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_over_pages(dtype: torch.dtype, scoring: Scoring) -> None:
    g = torch.Generator().manual_seed(0)
    rows, pages, page = 6, 16, paged_attention.PAGE
    keys, values = (torch.randn((rows * pages + 1) * page, 2, 64, generator=g).to(dtype) for _ in range(2))
    query = torch.randn(rows, 4, 64, generator=g).to(dtype)
    table = (torch.randperm(rows * pages, generator=g) + 1).view(rows, pages)
    position = torch.tensor([0, 62, 63, 64, 513, 1023])
    inputs = [x.to("cuda") for x in (query, keys, values, table.int(), position)]
    out = paged_attention.attend(*inputs, on_gpu(scoring)).cpu()
    for row in range(rows):
        place = (table[row][:, None] * page + torch.arange(page)).flatten()[: position[row] + 1]
        key, value = (x[place].float().transpose(0, 1)[None] for x in (keys, values))
        right = causal_attention(query[row].float()[None, :, None], key, value, scoring)[0, :, 0]
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[row].float(), right, rtol=tolerance, atol=tolerance)
