"""Packed attention inside real models against each sequence on its own."""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from RL2.ops.attention import IMPLEMENTATION, PackedAttention

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
LENGTHS = [5, 17, 1, 17, 40, 3, 6, 7, 8, 60]


def models() -> list[Any]:
    return [(Qwen3Config, Qwen3ForCausalLM), (Qwen2Config, Qwen2ForCausalLM), (LlamaConfig, LlamaForCausalLM)]


def make(config: Any, model: Any, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made = model(config(**SHAPE, initializer_range=0.3)).eval()
    made.set_attn_implementation(implementation)
    return made


@pytest.mark.parametrize("padding", [0, 2, 16, 100])
@pytest.mark.parametrize(("config", "model"), models(), ids=lambda x: x.__name__)
def test_a_packed_batch_is_its_sequences(config: Any, model: Any, padding: int) -> None:
    packed, plain = make(config, model, IMPLEMENTATION), make(config, model, "eager")
    g = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 50, (n,), generator=g) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    attend = PackedAttention(torch.tensor([0, *LENGTHS]).cumsum(0), max_padding=padding)

    hidden = packed.base_model(
        input_ids=torch.cat(sequences)[None], position_ids=positions[None], use_cache=False, attend=attend
    ).last_hidden_state[0]
    alone = torch.cat([plain.base_model(input_ids=s[None]).last_hidden_state[0] for s in sequences])
    torch.testing.assert_close(hidden, alone, rtol=1e-4, atol=1e-5)

    weight = torch.randn(alone.shape, generator=g)
    grads = torch.autograd.grad((hidden * weight).sum(), list(packed.base_model.parameters()))
    alone_grads = torch.autograd.grad((alone * weight).sum(), list(plain.base_model.parameters()))
    for ours, theirs in zip(grads, alone_grads, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_blocks_are_few_and_waste_little() -> None:
    lengths = [*range(1, 400, 7), *[50] * 100, 1000]
    attend = PackedAttention(torch.tensor([0, *lengths]).cumsum(0), max_padding=16)
    assert sorted(b for block in attend.blocks for b in block) == list(range(len(lengths)))
    for block in attend.blocks:
        assert all(lengths[block[0]] - 16 <= lengths[b] <= lengths[block[0]] for b in block)
    assert len(attend.blocks) <= 400 // 16 + 1
    assert sum(rows * length for rows, length in attend.shapes) <= 1.1 * sum(lengths)


def test_masks_are_refused() -> None:
    lm = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    lm.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(ValueError, match="Qwen2Attention has a mask"):
        lm.base_model(
            input_ids=torch.zeros(1, 3, dtype=torch.long),
            attention_mask=torch.zeros(1, 1, 3, 3),
            attend=PackedAttention(torch.tensor([0, 3])),
            use_cache=False,
        )
