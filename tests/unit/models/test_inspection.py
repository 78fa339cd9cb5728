"""Structures that packed attention does not compute, planted one at a time into a model that is exact otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig

from RL2.batch.packing import pack_tokens
from RL2.errors import ConfigError
from RL2.models.inspection import length_limit, refuse_inexact
from RL2.models.policy import Policy
from RL2.ops.attention import IMPLEMENTATION
from RL2.types import StatsRequest

Change = Callable[[LlamaForCausalLM], None]


class Planted:
    """An auto class whose model is a Llama with one change."""

    def __init__(self, change: Change) -> None:
        self.change = change

    def from_config(self, config: PretrainedConfig, **settings: Any) -> LlamaForCausalLM:
        lm = AutoModelForCausalLM.from_config(config, **settings)
        self.change(lm)
        return lm


def judged(change: Change, **settings: Any) -> str | None:
    """Return why the changed Llama runs row by row; None if it runs packed. Raise ConfigError if it is refused."""
    return refuse_inexact(Planted(change), tiny_config("llama", settings), "F")


def refusal(change: Change) -> str:
    with pytest.raises(ConfigError) as caught:
        judged(change)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix("F: llama ")


def in_mlp(mix: Callable[[Tensor], Tensor]) -> Change:
    """Let the MLP of the second layer see the hidden states [1, T, D] through `mix`."""

    def change(lm: LlamaForCausalLM) -> None:
        lm.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: (mix(args[0]),))

    return change


MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "shift": lambda x: x + functional.pad(x, (0, 0, 1, 0))[:, :-1],
    "roll": lambda x: x.roll(1, dims=1),
    "convolution": lambda x: functional.conv1d(x.mT, torch.ones(64, 1, 3, device=x.device), groups=64, padding=1).mT,
    "running sum": lambda x: x.cumsum(1),
    "mean over the sequence": lambda x: x - x.mean(1, keepdim=True),
    "sum over everything": lambda x: x / x.sum(),
    "mixing matrix": lambda x: torch.ones(x.shape[1], x.shape[1], device=x.device) @ x,
    "first token": lambda x: x + x[:, 0],
    "recurrence": lambda x: torch.stack([x[:, t] for t in range(x.shape[1])], 1),
    "softmax over the sequence": lambda x: x.softmax(1),
    "norm over the sequence": lambda x: functional.normalize(x, dim=1),
    "maximum over the sequence": lambda x: x - x.max(1, keepdim=True).values,
    "sorting": lambda x: x.sort(1).values,
    "gather": lambda x: x.index_select(1, torch.zeros(x.shape[1], dtype=torch.long, device=x.device)),
}


@pytest.mark.parametrize("mixer", MIXERS)
def test_whatever_mixes_tokens_outside_attention_is_not_packed(mixer: str) -> None:
    assert str(judged(in_mlp(MIXERS[mixer]))).startswith("mixes tokens outside attention ("), mixer


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "gpt_oss"])
def test_mixtures_of_experts_are_packed(model_type: str) -> None:
    assert refuse_inexact(AutoModelForCausalLM, tiny_config(model_type), "F") is None


def test_what_acts_on_each_token_alone_is_packed() -> None:
    assert judged(in_mlp(lambda x: x.softmax(-1) * x.mean(-1, keepdim=True) + x.cumsum(-1).flip(-1))) is None


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"head_dim": 74}),
        ("llama", {"head_dim": 2 * 37 * 41}),
        ("qwen3", {"num_attention_heads": 37, "num_key_value_heads": 37}),
        ("qwen3", {"vocab_size": 37, "hidden_size": 74, "head_dim": 82}),
        ("llama", {"num_key_value_heads": 1}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ],
)
def test_sizes_and_settings_without_effect_are_no_reason(model_type: str, settings: dict[str, Any]) -> None:
    assert refuse_inexact(AutoModelForCausalLM, tiny_config(model_type, settings), "F") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda lm: setattr(lm.lm_head, "bias", nn.Parameter(torch.zeros(320, device="meta"))),
        lambda lm: lm.register_forward_hook(double_logits),
    ],
)
def test_changes_that_token_stats_computes_are_packed(change: Change) -> None:
    assert judged(change) is None


def attention_with(**arguments: Any) -> Change:
    """Let every attention pass these on to transformers' attention interface."""

    def change(lm: LlamaForCausalLM) -> None:
        for layer in lm.model.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, **arguments}), with_kwargs=True
            )

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (attention_with(attention_mask=torch.zeros(1, 1, 4, 4)), "passes its own mask to attention"),
        (attention_with(sliding_window=8), "masks attention by a rule that packed attention does not have"),
        (attention_with(s_aux=torch.zeros(4, 2)), "has attention sinks that are not one number per head"),
        (attention_with(softcap=torch.ones(())), "scales, caps or limits attention by something other than a number"),
        (attention_with(position_bias=torch.zeros(1)), "passes position_bias to attention"),
        (lambda lm: setattr(lm.model.layers[1].self_attn, "layer_idx", 0), "calls attention 2 times in 2 layers"),
        (lambda lm: setattr(lm.model.layers[0], "experts", Experts()), "has a weight of three dimensions outside"),
    ],
)
def test_a_model_with_more_than_packed_attention_runs_row_by_row(change: Change, said: str) -> None:
    assert str(judged(change)).startswith(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (attention_with(is_causal=False), "has attention that is not causal"),
        (lambda lm: setattr(lm.model.layers[0].self_attn, "is_causal", False), "has attention that is not causal"),
        (
            lambda lm: lm.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
            "changes the hidden states before the head",
        ),
        (lambda lm: lm.register_forward_hook(squared_logits), "changes its logits after the head by neither"),
        (
            lambda lm: lm.model.register_buffer("offset", torch.zeros(4), persistent=False),
            "has buffers that nothing sets",
        ),
        (
            lambda lm: lm.model.register_buffer("order", torch.arange(4), persistent=False),
            "has buffers that nothing sets, among them model.order",
        ),
        (
            lambda lm: lm.model.register_buffer("is_known", torch.ones(4, dtype=torch.bool), persistent=False),
            "has buffers that nothing sets, among them model.is_known",
        ),
        (lambda lm: setattr(lm.model, "vision", nn.Linear(2, 2)), "has weights that text does not use"),
        (lambda lm: dropout_in_layer(lm), "draws random numbers in its layers (dropout)"),
    ],
)
def test_what_neither_path_computes_is_refused(change: Change, said: str) -> None:
    assert refusal(change).startswith(said)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))


def double_logits(_: nn.Module, __: Any, out: Any) -> Any:
    out["logits"] = out["logits"] * 2
    return out


def squared_logits(_: nn.Module, __: Any, out: Any) -> Any:
    out["logits"] = out["logits"] * out["logits"].abs()
    return out


def dropout_in_layer(lm: LlamaForCausalLM) -> None:
    layer = lm.model.layers[0]
    layer.register_forward_hook(lambda module, _, out: functional.dropout(out, 0.1, training=module.training))


def test_a_quantised_configuration_is_refused() -> None:
    config = tiny_config("qwen3")
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ConfigError, match=r"^F: qwen3 is quantised \(fp8\), and its scales would be lost"):
        refuse_inexact(AutoModelForCausalLM, config, "F")


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2.0}, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, None),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 48,
            },
            48,
        ),
    ],
)
def test_rotary_frequencies_by_the_longest_sequence_limit_all(rope: dict[str, Any], limit: int | None) -> None:
    config = tiny_config("llama", {"rope_parameters": {"rope_theta": 10000.0, **rope}})
    assert length_limit(config) == limit
    policy = Policy(tiny_model(config))
    most = limit or 600
    policy_of(policy, most)
    if limit is not None:
        with pytest.raises(
            ConfigError, match=f"a sequence has {limit + 1} tokens, but beyond {limit} LlamaForCausalLM"
        ):
            policy_of(policy, limit + 1)


def policy_of(policy: Policy, length: int) -> None:
    """Run the packed forward on a sequence of `length` positions and a short one."""
    policy.lm.set_attn_implementation(IMPLEMENTATION)
    policy(pack_tokens([[5] * (length + 1), [6, 7]]), None, StatsRequest(("logp",)))
