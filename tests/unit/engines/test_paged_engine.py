"""Keys and values in pages: the kernel against plain attention, and the engine with it against the one without.

Without a GPU the kernel runs under Triton's interpreter (conftest.py) and steps are not recorded as graphs.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import torch
from sampling import generate
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from RL2.engines.embedded import engine as engine_module
from RL2.engines.embedded import packed as packed_module
from RL2.engines.embedded.engine import EmbeddedEngine, OutOfMemory
from RL2.engines.embedded.paged import PagedCache, pages_of, rounded
from RL2.engines.embedded.speculation import Speculation
from RL2.engines.memory import bytes_per_position
from RL2.ops import paged_attention
from RL2.ops.attention import IMPLEMENTATION
from RL2.ops.causal_attention import Scoring
from RL2.types import Completion, Sampling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGE, PART_PAGES = 16, 2
PART = PAGE * PART_PAGES


@pytest.fixture(autouse=True)
def small_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences have several pages, and parts; without a GPU, the kernel is left to its own test."""
    monkeypatch.setattr(paged_attention, "PAGE", PAGE)
    monkeypatch.setattr(paged_attention, "PART_PAGES", PART_PAGES)
    if DEVICE.type == "cpu" and "kernel" not in request.node.name:
        monkeypatch.setattr(paged_attention, "attend", looked_up)


def plain(query_HD: Tensor, key_SKD: Tensor, value_SKD: Tensor, scoring: Scoring) -> Tensor:
    """Attention of one query, at the last of S positions, in float64."""
    groups = query_HD.shape[0] // key_SKD.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key_SKD, value_SKD))
    score_HS = torch.einsum("hd,shd->hs", query_HD.double(), key) * scoring.scaling
    if scoring.softcap:
        score_HS = scoring.softcap * torch.tanh(score_HS / scoring.softcap)
    if scoring.window:
        score_HS[:, : -scoring.window] = -torch.inf
    if scoring.sink_H is not None:
        score_HS = torch.cat([score_HS, scoring.sink_H[:, None].double()], 1)
    return torch.einsum("hs,shd->hd", score_HS.softmax(-1)[:, : len(key)], value)


def looked_up(
    query_RHD: Tensor, key_SKD: Tensor, value_SKD: Tensor, table_RP: Tensor, position_R: Tensor, scoring: Scoring
) -> Tensor:
    """What the kernel computes: a hundred times faster than its interpretation."""
    out = []
    for query_HD, table_P, position in zip(query_RHD, table_RP, position_R.tolist(), strict=True):
        at = torch.arange(position + 1)
        place = table_P[at // PAGE].long() * PAGE + at % PAGE
        out.append(plain(query_HD, key_SKD[place], value_SKD[place], scoring))
    return torch.stack(out).to(query_RHD.dtype)


SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
"""Of four heads."""


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "scoring", "value_size"),
    [
        (4, 2, 8, Scoring(0.3), 8),
        (3, 3, 64, Scoring(0.3), 64),
        (6, 1, 48, Scoring(0.3), 48),
        (4, 2, 8, Scoring(0.3, window=1), 8),
        (4, 2, 8, Scoring(0.3, window=PAGE + 3), 8),
        (4, 2, 8, Scoring(0.3, softcap=0.5), 8),
        (4, 2, 8, Scoring(0.3, sink_H=SINKS), 8),
        (4, 2, 24, Scoring(0.3, window=PART - 1, softcap=2.0, sink_H=SINKS), 16),
    ],
)
def test_the_kernel_is_plain_attention(heads: int, kv_heads: int, size: int, scoring: Scoring, value_size: int) -> None:
    g = torch.Generator().manual_seed(0)
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, PART, PART + 1, 2 * PART - 5]
    num_pages = sum(map(pages_of, lengths)) + 1
    keys, values = (torch.randn(num_pages * PAGE, kv_heads, n, generator=g) for n in (size, value_size))
    query_RHD = torch.randn(len(lengths), heads, size, generator=g)
    pages = torch.randperm(num_pages - 1, generator=g).add(1).split([pages_of(n) for n in lengths])
    table = torch.full((len(lengths), 2 * PART_PAGES), 2**30, dtype=torch.int32)  # what is behind must not be read
    for row, (own, length) in enumerate(zip(pages, lengths, strict=True)):
        unseen = max(0, length - (scoring.window or length)) // PAGE  # pages before the window must not be read
        table[row, unseen : len(own)] = own[unseen:]
        behind = (own[-1] * PAGE + torch.arange(PAGE))[(length - 1) % PAGE + 1 :]
        keys[behind], values[behind] = float("nan"), float("nan")
    position_R = torch.tensor(lengths) - 1
    inputs = [x.to(DEVICE) for x in (query_RHD, keys, values, table, position_R)]
    if scoring.sink_H is not None:
        scoring = scoring._replace(sink_H=scoring.sink_H.to(DEVICE))
    out = paged_attention.attend(*inputs, scoring).cpu()  # type: ignore[arg-type]
    for row, (own, length) in enumerate(zip(pages, lengths, strict=True)):
        places = (own[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length]
        right = plain(query_RHD[row], keys[places], values[places], scoring)
        torch.testing.assert_close(out[row].double(), right, rtol=1e-5, atol=1e-5)
        alone = [x[row : row + 1] if i in (0, 3, 4) else x for i, x in enumerate(inputs)]
        assert torch.equal(paged_attention.attend(*alone, scoring)[0].cpu(), out[row])  # type: ignore[arg-type]


SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 400,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval().to(DEVICE)
    lm.set_attn_implementation(IMPLEMENTATION)
    return lm


class Paged(EmbeddedEngine):
    """As on a GPU, with so many pages."""

    def __init__(self, lm: PreTrainedModel, rows: int, num_pages: int) -> None:
        super().__init__(lm, decode=str, max_running_requests=rows, memory_share=0.5)
        self.num_pages = num_pages
        self.made = 0

    def _new_cache(self) -> PagedCache:
        position = bytes_per_position(self.lm.config, self.lm.dtype)
        budget, rows = position * PAGE * self.num_pages, self.max_running_requests
        self.made += 1
        return PagedCache(self.model, budget, position, max_rows=rows, longest=self.longest, max_length=self.max_length)

    def step(self) -> None:
        super().step()
        assert isinstance(self.cache, PagedCache)
        check(self.cache, [request.length for request in self.running])


def check(cache: PagedCache, lengths: list[int]) -> None:
    """Every page is free or has as many users as rows that name it; rows have what they need."""
    assert len(cache.pages) == len(lengths)
    named = [page for pages in cache.pages for page in pages]
    assert cache.users == [named.count(page) for page in range(cache.num_pages)]
    assert sorted({*cache.free, *named}) == list(range(1, cache.num_pages))
    assert not set(cache.free) & set(named)
    assert len(set(cache.free)) == len(cache.free)
    for row, (pages, length) in enumerate(zip(cache.pages, lengths, strict=True)):
        assert len(pages) >= pages_of(length - 1)
        assert cache.table_RP[row, : len(pages)].tolist() == pages


def alike(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    assert [c.finish for c in ours] == [c.finish for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), rtol=0, atol=1e-4)


def prompts() -> list[list[int]]:
    """Some alone, some in groups; shorter and longer than a page, and exactly one."""
    g = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, 64, (n,), generator=g).tolist() for n in (3, PAGE, PAGE + 7)]
    return [drawn[i] for i in (0, 1, 1, 2, 2, 2)]


@pytest.mark.parametrize("num_pages", [100, 16])
def test_samples_are_those_of_the_other_cache(lm: PreTrainedModel, num_pages: int) -> None:
    """With much memory, and with so little that requests wait for others, or are sent back and computed again."""
    sampling = Sampling(max_new_tokens=40)
    dense = EmbeddedEngine(lm, decode=str, max_running_requests=16, memory_share=0.5)
    dense._new_cache = lambda: dense_cache(dense)  # type: ignore[method-assign]
    paged = Paged(lm, 16, num_pages)
    alike(generate(paged, prompts(), sampling), generate(dense, prompts(), sampling))
    assert (paged.model.prefilled > dense.model.prefilled) == (num_pages == 16)


@pytest.mark.parametrize(("num_pages", "most"), [(100, 100), (16, 1)])
def test_drafts_change_nothing(lm: PreTrainedModel, num_pages: int, most: int) -> None:
    """With little memory, drafts give way to requests. In the second epoch all drafts are right."""
    sampling = Sampling(max_new_tokens=40, temperature=0.5)
    plain, drafting = Paged(lm, 16, num_pages), Paged(lm, 16, num_pages)
    drafting.speculation = Speculation("always", time.perf_counter)
    right = generate(plain, prompts(), sampling)
    for least in (0, most):
        alike(generate(drafting, prompts(), sampling), right)
        metrics = drafting.metrics()
        assert metrics["engine/drafted"] >= metrics["engine/accepted"] >= least


def dense_cache(engine: EmbeddedEngine) -> Any:
    from RL2.engines.embedded.dense import DenseCache

    return DenseCache(engine.model, 1e9)


def test_a_group_has_its_prompt_once(lm: PreTrainedModel) -> None:
    engine = Paged(lm, 8, 50)
    engine.longest = 400
    cache = engine._new_cache()
    assert all(cache.add(row, 2 * PAGE + 5, like=None if row == 0 else 0) for row in range(8))
    assert len({page for pages in cache.pages for page in pages}) == 2 + 8
    cache.leave([0, 1], [6, 7], [0, 1], 200)
    check(cache, [2 * PAGE + 5] * 6)
    cache.leave([0, 1, 2, 3, 4, 5], [], [], 0)
    assert len(cache.free) == 49


def test_memory_for_less_than_one_request_is_said(lm: PreTrainedModel) -> None:
    with pytest.raises(OutOfMemory, match="the KV cache of one request of 70 tokens does not fit into 50%"):
        generate(engine := Paged(lm, 4, 2), [[3] * 60], Sampling(max_new_tokens=10))
    assert generate(engine, [[3]], Sampling(max_new_tokens=2))[0].finish == "length"  # a smaller one is served


def test_a_longer_request_than_was_known_gets_its_memory(lm: PreTrainedModel) -> None:
    """A later turn is longer; what runs by then is computed again."""
    engine = Paged(lm, 4, 100)

    async def everything() -> list[Completion]:
        first = asyncio.create_task(engine.generate([5, 6, 7], Sampling(max_new_tokens=30, seed=1)))
        while not engine.running or len(engine.running[0].tokens) < 10:
            await asyncio.sleep(0)
        assert isinstance(engine.cache, PagedCache) and engine.cache.num_pages == 4 * pages_of(33) + 1
        second = asyncio.create_task(engine.generate([8] * 250, Sampling(max_new_tokens=30, seed=2)))
        return [await first, await second]

    ours = asyncio.run(everything())
    assert engine.made == 2
    plain = EmbeddedEngine(lm, decode=str, max_running_requests=4, memory_share=0.5)
    alike(
        ours,
        [
            asyncio.run(plain.generate([5, 6, 7], Sampling(max_new_tokens=30, seed=1))),
            asyncio.run(plain.generate([8] * 250, Sampling(max_new_tokens=30, seed=2))),
        ],
    )


@pytest.mark.parametrize("paged", [False, True])
def test_a_long_prompt_runs_in_pieces(lm: PreTrainedModel, paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(2)
    long = torch.randint(0, 64, (250,), generator=g).tolist()
    everything = [[5, 6, 7], long, long, [5, 6], long[:100]]
    whole, pieces = (
        Paged(lm, 8, 60) if paged else EmbeddedEngine(lm, decode=str, max_running_requests=8, memory_share=0.5)
        for _ in range(2)
    )
    right = generate(whole, everything, Sampling(max_new_tokens=20))
    for module in (engine_module, packed_module):
        monkeypatch.setattr(module, "PREFILL_TOKENS", 70)
    passes: list[int] = []
    forward = pieces.model.hidden
    monkeypatch.setattr(pieces.model, "hidden", lambda ids, *rest: (passes.append(len(ids)), forward(ids, *rest))[1])
    alike(generate(pieces, everything, Sampling(max_new_tokens=20)), right)
    assert passes[:2] == [3, 1] and {70, 40} < set(passes) and max(passes) == 70


def test_few_sizes() -> None:
    sizes = {rounded(n) for n in range(1, 257)}
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 128, 192, 256}
    assert all(n <= rounded(n) <= max(2 * n, n + 63) for n in range(1, 1000))
