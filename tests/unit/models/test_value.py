from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from RL2.batch.packing import pack
from RL2.errors import ConfigError
from RL2.models.value import VALUE, ValueModel
from RL2.types import Sequence, TokenBatch, Trajectory

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG = Qwen3Config(vocab_size=50, intermediate_size=48, head_dim=8, initializer_range=0.2, pad_token_id=0, **SHAPE)
IDS = [[5, 6, 7, 8, 9], [5, 6, 7, 3], [11, 12, 13, 14, 15, 16, 17]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("value")
    torch.manual_seed(0)
    Qwen3ForCausalLM(CONFIG).save_pretrained(folder / "causal")
    Qwen3ForSequenceClassification(CONFIG.__class__.from_dict(CONFIG.to_dict() | {"num_labels": 1})).save_pretrained(
        folder / "value"
    )
    Qwen3ForSequenceClassification(CONFIG.__class__.from_dict(CONFIG.to_dict() | {"num_labels": 3})).save_pretrained(
        folder / "three"
    )
    return folder


def batch() -> TokenBatch:
    """The first two share the beginning of a group; every token but the first of a sequence is an action."""
    zeros = [[0.0] * len(ids) for ids in IDS]
    sequences = [Sequence(ids, [False] + [True] * (len(ids) - 1), z, z) for ids, z in zip(IDS, zeros, strict=True)]
    return pack([Trajectory(n, n // 2, n % 2, [sequence]) for n, sequence in enumerate(sequences)])


def test_values_are_those_of_transformers_at_every_token(folder: Path) -> None:
    model = ValueModel.load(str(folder / "value")).eval()
    packed = batch()
    shared = packed.shared()
    assert shared is not None
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "value").eval()
    with torch.no_grad():
        values = model(packed, shared, VALUE)["value"]
        # transformers reads its score at the last token, so it sees every beginning of every sequence
        prefixes = [ids[: n + 1] for ids in IDS for n in range(len(ids) - 1)]
        expected = torch.cat([plain(torch.tensor([prefix])).logits[0] for prefix in prefixes])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_a_causal_model_gets_a_new_head_of_torchs_random_numbers(folder: Path) -> None:
    def head() -> torch.Tensor:
        return ValueModel.load(str(folder / "causal")).lm.get_submodule("score").weight.detach()

    torch.manual_seed(3)
    first, second = head(), head()
    torch.manual_seed(3)
    assert torch.equal(head(), first)
    assert not torch.equal(first, second)
    assert first.shape == (1, 32)


def test_gradients_reach_head_and_backbone(folder: Path) -> None:
    model = ValueModel.load(str(folder / "causal")).train()
    packed = batch()
    model(packed, packed.shared(), VALUE)["value"].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_what_is_no_value_model_is_refused(folder: Path) -> None:
    for name in ("three", "nothing"):
        with pytest.raises(ConfigError, match=f"^{folder / name}: "):
            ValueModel.load(str(folder / name))
