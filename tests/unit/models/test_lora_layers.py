"""The layers that get an adapter."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from RL2.config.model import Lora
from RL2.errors import ConfigError
from RL2.models.lora import add_adapters


def layers(*target_modules: str) -> set[str]:
    """Return the names of the layers of a Llama that have an adapter."""
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        lm = LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape))
    add_adapters(lm, Lora(rank=2, target_modules=target_modules), torch.float32, "llama", "actor")
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in lm.named_parameters() if ".lora_A" in name}


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    assert layers("all-linear") == set(Lora().target_modules)
    assert layers("v_proj", "q_proj") == {"v_proj", "q_proj"}


def test_an_estimate_counts_the_layers_of_all_linear() -> None:
    assert Lora(target_modules=("all-linear",)).counted == Lora().target_modules
    assert Lora(target_modules=("q_proj",)).counted == ("q_proj",)


def test_a_name_beside_all_linear_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^actor\.lora\.target_modules has all-linear, but the linear layers of Llama"
    ):
        layers("all-linear", "q_proj")
