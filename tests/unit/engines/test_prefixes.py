"""Keys and values that later turns reuse: the same samples, fewer positions, and bounded memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from sampling import logits_of
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from RL2.engines.embedded.engine import EmbeddedEngine
from RL2.engines.embedded.packed import PackedForward
from RL2.engines.embedded.prefixes import BLOCK, Layers, PrefixTree
from RL2.engines.memory import bytes_per_position
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import Completion, Sampling

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 1000,
    "initializer_range": 0.3,
}
TURNS, ANSWER, OBSERVATION = 3, 12, 50


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()
    lm.set_attn_implementation(IMPLEMENTATION)
    return lm


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    return make_model()


def make_engine(lm: PreTrainedModel, reuses: bool, rows: int = 4, **options: Any) -> EmbeddedEngine:
    return EmbeddedEngine(
        lm, decode=str, max_running_requests=rows, memory_share=0.2, reuses_prefixes=reuses, **options
    )


def drawn(seed: int, number: int) -> list[int]:
    return torch.randint(4, 60, (number,), generator=torch.Generator().manual_seed(seed)).tolist()


async def episode(engine: EmbeddedEngine, prompt: list[int], seed: int) -> list[tuple[list[int], Completion]]:
    """Several turns: each prompt has all before it."""
    ids, turns = list(prompt), []
    for turn in range(TURNS):
        done = await engine.generate(list(ids), Sampling(ANSWER, seed=seed * 10 + turn))
        turns.append((list(ids), done))
        ids += done.token_ids + drawn(seed * 10 + turn, OBSERVATION)
    return turns


def play(engine: EmbeddedEngine) -> list[tuple[list[int], Completion]]:
    """Two groups of three, of which not all run at once."""

    async def everything() -> list[list[tuple[list[int], Completion]]]:
        return await asyncio.gather(*(episode(engine, drawn(n % 2, 70), n) for n in range(6)))

    return [turn for episode in asyncio.run(everything()) for turn in episode]


@pytest.mark.parametrize("speculation", ["off", "always"])
def test_later_turns_run_their_new_tokens_alone(lm: PreTrainedModel, speculation: str) -> None:
    plain, reusing = make_engine(lm, False), make_engine(lm, True, speculation=speculation)
    right, ours = play(plain), play(reusing)
    for (prompt, a), (same, b) in zip(right, ours, strict=True):
        assert prompt == same
        assert (a.token_ids, a.finish, a.versions) == (b.token_ids, b.finish, b.versions)
        logp = logits_of(lm, prompt, b).log_softmax(-1).gather(1, torch.tensor(b.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(b.logps), logp, rtol=0, atol=1e-4)
    assert isinstance(plain.model, PackedForward) and isinstance(reusing.model, PackedForward)
    reused = reusing.metrics()["engine/reused_positions"]
    # each later turn runs what is new, and less than a block more
    later = sum(len(prompt) for prompt, _ in right if len(prompt) > 70)
    assert reused >= later - 6 * (TURNS - 1) * (OBSERVATION + 1 + BLOCK)
    assert reusing.model.prefilled <= plain.model.prefilled - reused + 70 * 4


def test_new_weights_reuse_nothing(lm: PreTrainedModel) -> None:
    engine, new = make_engine(make_model(), True), make_model()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(1.1)
    prompt = drawn(1, 100)
    asyncio.run(engine.generate(prompt, Sampling(5)))
    engine.load_weights(iter(new.named_parameters()), version=1)
    done = asyncio.run(engine.generate(prompt, Sampling(5)))
    right = asyncio.run(make_engine(new, False).generate(prompt, Sampling(5)))
    assert done.token_ids == right.token_ids
    torch.testing.assert_close(torch.tensor(done.logps), torch.tensor(right.logps), rtol=0, atol=1e-5)
    assert engine.metrics()["engine/reused_positions"] == 0
    asyncio.run(engine.generate(prompt, replace(Sampling(5), seed=1)))
    assert engine.metrics()["engine/reused_positions"] == 96
    engine.sleep()
    assert engine.prefixes is not None and engine.prefixes.num_bytes == 0 and not engine.prefixes.nodes


def test_memory_is_bounded(lm: PreTrainedModel) -> None:
    """An engine with room for little samples the same; what was used last stays."""
    engine = make_engine(lm, True)
    asyncio.run(engine.generate(drawn(0, 10), Sampling(2)))
    assert engine.prefixes is not None
    limit = bytes_per_position(lm.config, lm.dtype) * BLOCK * 3
    new_cache = engine._new_cache

    def little() -> Any:
        cache = new_cache()
        assert engine.prefixes is not None
        engine.prefixes.limit_bytes = limit
        return cache

    engine._new_cache = little  # type: ignore[method-assign]
    ours, right = play(engine), play(make_engine(lm, False))
    assert [b.token_ids for _, b in ours] == [a.token_ids for _, a in right]
    assert 0 < engine.prefixes.num_bytes <= limit


def blocks(*numbers: int) -> list[int]:
    return [number for number in numbers for _ in range(BLOCK)]


def test_sequences_share_what_they_begin_with() -> None:
    """And the least recently used blocks go first, the later ones of a sequence before its earlier ones."""
    copied: list[tuple[int, int]] = []

    def read(start: int, end: int) -> Layers:
        copied.append((start, end))
        return [(torch.full((1, BLOCK, 1), float(start)),) * 2]

    def found(*numbers: int) -> list[int]:
        return [int(layers[0][0][0, 0, 0]) // BLOCK for layers in tree.find(tuple(blocks(*numbers)))]

    tree = PrefixTree()
    size = 2 * 4 * BLOCK
    tree.limit_bytes = 5 * size
    tree.add(blocks(1, 2, 3), read)
    tree.add([*blocks(1, 2, 4), 7, 7], read)
    assert [start // BLOCK for start, _ in copied] == [0, 1, 2, 2]
    assert tree.num_bytes == 4 * size
    assert found(1, 2, 3, 9) == [0, 1, 2]
    assert found(1, 2, 4) == [0, 1], "the last token has to be run"
    assert found(1, 5) == [0] and found(2, 2) == []
    tree.find(tuple(blocks(1, 2, 3, 9)))
    tree.add(blocks(8, 9), read)  # the block 4 was used least recently
    assert tree.num_bytes == 5 * size and len(tree.nodes) == 5
    assert found(1, 2, 4, 9) == [0, 1] and found(1, 2, 3, 9) == [0, 1, 2]
    tree.limit_bytes = 2 * size
    tree.add(blocks(8), read)
    assert found(8, 9, 9) == [0] and found(1, 2, 3, 9) == [0]
