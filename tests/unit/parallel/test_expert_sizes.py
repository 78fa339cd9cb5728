"""Models and sizes for which experts cannot be split over processes. The split itself is tested by tests/invariants."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from RL2.errors import ConfigError
from RL2.parallel.experts import check_experts


def on_meta(model_type: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type))
    return model


@pytest.mark.parametrize(
    ("model_type", "size", "message"),
    [
        ("qwen3", 2, "Qwen3ForCausalLM has no experts that transformers calls through its interface for experts; set"),
        ("doge", 2, "DogeForCausalLM has no experts"),
        ("mixtral", 3, "does not divide the 4 experts of MixtralForCausalLM"),
    ],
)
def test_a_model_whose_experts_cannot_be_split(model_type: str, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^critic.ep_size={size}:? {message}"):
        check_experts(on_meta(model_type), size, "critic")


def test_parameters_that_experts_share_are_refused() -> None:
    lm = on_meta("mixtral")
    experts = lm.get_submodule("model.layers.1.mlp.experts")
    experts.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ConfigError, match=r"^actor\.ep_size=2: the experts of MixtralForCausalLM share parameters"):
        check_experts(lm, 2, "actor")


@pytest.mark.parametrize(("model_type", "size"), [("mixtral", 4), ("gpt_oss", 2), ("qwen3", 1)])
def test_other_sizes_are_accepted(model_type: str, size: int) -> None:
    check_experts(on_meta(model_type), size, "actor")
