"""Sliding windows, soft caps and sinks in whole models: shared prefixes, caches and long prompts.

Reference: transformers' eager attention on each sequence alone. Windows are shorter than sequences and prefixes.
"""

from __future__ import annotations

import pytest
import torch
from sampling import generate
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from RL2.batch.packing import pack_tokens
from RL2.engines.embedded import engine as engine_module
from RL2.engines.embedded import packed as packed_module
from RL2.engines.embedded.dense import LENGTH_STEP, DenseCache
from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.packed import PackedForward
from RL2.engines.embedded.paged import PagedCache
from RL2.engines.memory import bytes_per_position, bytes_per_row
from RL2.models.policy import Policy
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import Sampling, StatsRequest

MODELS = ("gemma2", "gemma3_text", "gemma4_text", "granite_swa", "mistral", "olmo3", "deepseek_v3")
"""Soft caps, frequencies by type of layer, head sizes by layer, sinks, a window in every layer, small values."""
WINDOW = 16
TOLERANCE = 1e-4
"""Nats, in float32."""


def packed_and_plain(name: str, **sizes: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    packed, plain = (tiny_model(tiny_config(name, sizes)) for _ in range(2))
    packed.set_attn_implementation(IMPLEMENTATION)
    plain.set_attn_implementation("eager")
    return packed, plain


def drawn(*lengths: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(4, 300, (length,), generator=g).tolist() for length in lengths]


def alone(lm: PreTrainedModel, ids: list[int]) -> Tensor:
    logp = lm(torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
    return logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prefix_longer_than_the_window_is_exact(name: str) -> None:
    packed, plain = packed_and_plain(name)
    prefix, *rests = drawn(2 * WINDOW + 5, 3, 40, 1, 3)
    sequences = [prefix + rest for rest in rests]
    batch = pack_tokens(sequences)
    batch = batch.with_(group_B=torch.zeros_like(batch.group_B))
    shared = batch.shared()
    assert shared is not None and len(shared.distinct_U) < len(batch.token_ids_T)
    ours = Policy(packed).train()(batch, shared, StatsRequest(("logp",)))["logp"]
    right = torch.cat([alone(plain, ids) for ids in sequences])
    torch.testing.assert_close(ours, right, rtol=0, atol=TOLERANCE)
    ours.sum().backward()
    right.sum().backward()
    pairs = [(a.grad, b.grad) for a, b in zip(packed.parameters(), plain.parameters(), strict=True)]
    gaps = torch.stack([(a - b).norm() for a, b in pairs])
    assert gaps.norm() < 1e-3 * torch.stack([b.norm() for _, b in pairs]).norm()


class Paged(EmbeddedEngine):
    """The engine with the cache that it has on GPUs."""

    def _new_cache(self) -> PagedCache:
        position, rows = bytes_per_position(self.lm.config, self.lm.dtype), self.max_running_requests
        return PagedCache(self.model, 1e8, position, max_rows=rows, longest=self.longest, max_length=self.max_length)


@pytest.mark.parametrize("kind", [EmbeddedEngine, Paged])
@pytest.mark.parametrize("name", MODELS)
def test_caches_and_prompts_in_pieces_are_exact(
    name: str, kind: type[EmbeddedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests beyond the window enter and leave, and a prompt of several windows is cut into pieces."""
    packed, plain = packed_and_plain(name)
    for module in (engine_module, packed_module):
        monkeypatch.setattr(module, "PREFILL_TOKENS", 50)
    short, middle, long = drawn(3, WINDOW + 4, 120)
    prompts = [short, middle, middle, long, short, long]
    engine = kind(packed, decode=str, max_running_requests=3, memory_share=0.1)
    for prompt, done in zip(prompts, generate(engine, prompts, Sampling(max_new_tokens=6)), strict=True):
        right = alone(plain, prompt + done.token_ids)[-6:]
        torch.testing.assert_close(torch.tensor(done.logps), right.detach(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "layers"), [("gemma2", [0]), ("gemma4_text", [0]), ("granite_swa", [1]), ("mistral", [0, 1]), ("phi", [])]
)
def test_layers_with_a_window_keep_only_the_window(name: str, layers: list[int]) -> None:
    packed, _ = packed_and_plain(name)
    engine = EmbeddedEngine(packed, decode=str, max_running_requests=3, memory_share=0.1)
    assert isinstance(engine.model, PackedForward)
    cache, lengths = DenseCache(engine.model, 1e8), [3, 120]
    cache.reserve(lengths, 0, max(lengths), 2)
    cache.prefill({tuple(ids): [row] for row, ids in enumerate(drawn(*lengths))})
    assert engine.model.windows == dict.fromkeys(layers, WINDOW)
    kept = dict.fromkeys(layers, WINDOW + 1)
    for number, (keys, values) in enumerate(cache.layers):
        assert keys.shape[2] == values.shape[2] == kept.get(number, cache.length)
    row_bytes = bytes_per_row(packed.config, packed.dtype, kept, cache.length)
    assert sum(x.nbytes for pair in cache.layers for x in pair) == cache.rows * row_bytes
    assert cache.max_rows(cache.length - LENGTH_STEP) == int(1e8 // row_bytes) - 1


@pytest.mark.slow
@pytest.mark.parametrize("window", [WINDOW, 2 * LENGTH_STEP])
def test_a_compiled_step_is_exact_and_is_compiled_once(window: int) -> None:
    """It is compiled while layers with a window have the sizes of the others."""
    packed, plain = packed_and_plain("gemma2", sliding_window=window)
    before = counters["stats"]["unique_graphs"]
    engine = EmbeddedEngine(packed, decode=str, max_running_requests=4, memory_share=0.1, compiles=True)
    generate(engine, drawn(3, 5), Sampling(max_new_tokens=4))
    prompts = drawn(3, window + 4, 60, 12, 30)
    for prompt, done in zip(prompts, generate(engine, prompts, Sampling(max_new_tokens=30)), strict=True):
        right = alone(plain, prompt + done.token_ids)[-30:]
        torch.testing.assert_close(torch.tensor(done.logps), right.detach(), rtol=0, atol=TOLERANCE)
    assert counters["stats"]["unique_graphs"] == before + 1
