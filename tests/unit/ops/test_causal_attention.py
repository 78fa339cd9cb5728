"""Windows, soft caps and sinks against attention by its definition in float64, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from RL2.ops.causal_attention import Scoring, causal_attention

SINK_H = torch.tensor([0.5, -1.0, 2.0, 0.0])
SCORINGS = {
    "plain": Scoring(0.4),
    "window": Scoring(0.4, window=5),
    "window of a block": Scoring(0.4, window=128),
    "long window": Scoring(0.4, window=270),
    "window of everything": Scoring(0.4, window=300),
    "soft cap": Scoring(0.4, softcap=0.7),
    "sinks": Scoring(0.4, sink_H=SINK_H),
    "everything": Scoring(0.4, window=37, softcap=2.0, sink_H=SINK_H),
}


def by_definition(query_BHTD: Tensor, key_BKSD: Tensor, value_BKSE: Tensor, scoring: Scoring) -> Tensor:
    groups = query_BHTD.shape[1] // key_BKSD.shape[1]
    key_BHSD, value_BHSE = (x.repeat_interleave(groups, dim=1) for x in (key_BKSD, value_BKSE))
    score_BHTS = query_BHTD @ key_BHSD.mT * scoring.scaling
    if scoring.softcap is not None:
        score_BHTS = scoring.softcap * torch.tanh(score_BHTS / scoring.softcap)
    num_queries, num_keys = score_BHTS.shape[2:]
    i, j = torch.arange(num_keys)[-num_queries:, None], torch.arange(num_keys)
    is_visible = (j <= i) & (j > i - (scoring.window or num_keys))
    score_BHTS = score_BHTS.masked_fill(~is_visible, -torch.inf)
    if scoring.sink_H is not None:
        sink = scoring.sink_H[:, None, None].expand(*score_BHTS.shape[:3], 1)
        score_BHTS = torch.cat([score_BHTS, sink], -1)
    return score_BHTS.softmax(-1)[..., :num_keys] @ value_BHSE


@pytest.mark.parametrize("queries", [300, 170, 1])
@pytest.mark.parametrize("name", SCORINGS)
def test_attention_is_its_definition(name: str, queries: int) -> None:
    scoring = SCORINGS[name]
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), (2, 2, 300, 8), (2, 2, 300, 12 if queries == 170 else 8))
    inputs = [torch.randn(shape, generator=g) for shape in shapes]
    weight = torch.randn((2, 4, queries, shapes[2][3]), generator=g)
    results = []
    for attend, dtype in ((causal_attention, torch.float32), (by_definition, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        sinks = scoring.sink_H
        if sinks is not None:
            sinks = sinks.to(dtype).requires_grad_()
            leaves.append(sinks)
        out = attend(leaves[0], leaves[1], leaves[2], scoring._replace(sink_H=sinks))
        results.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
    for ours, right in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-5)
