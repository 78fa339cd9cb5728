"""The layers that get an adapter."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from RL2.config.load import load
from RL2.config.model import Lora
from RL2.errors import ConfigError
from RL2.models.lora import adapted_weights, add_adapters

SETTINGS = """train_data.path=x.jsonl train_data.prompts_per_rollout=2 rollout.env_path=x.py trainer.experiment_name=x
    rollout.train_sampling_params.max_new_tokens=1 actor.max_length_per_device=256 actor.model_name=x
    actor.lora.rank=4 actor.lora.target_modules=[q_proj,experts.down_proj]"""


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
    assert Lora(target_modules=("all-linear", "all-experts")).counted == Lora().target_modules


def test_a_name_beside_all_linear_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^actor\.lora\.target_modules has all-linear, but the linear layers of Llama"
    ):
        layers("all-linear", "q_proj")


def adapted(model_type: str, *target_modules: str) -> PreTrainedModel:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(tiny_config(model_type))
    add_adapters(lm, Lora(rank=2, target_modules=target_modules), torch.float32, model_type, "actor")
    return lm


@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen2_moe"])
def test_linear_layers_beside_experts_are_those_named(model_type: str) -> None:
    """peft would read the names of these layers as those of the experts, which transformers 4 kept one by one."""
    lm = adapted(model_type, "gate_proj", "up_proj", "down_proj")
    linear = {
        f"{name}.weight" for name, part in lm.named_modules() if name.endswith(("gate_proj", "up_proj", "down_proj"))
    }
    assert set(adapted_weights(lm)) == linear != set()


def test_experts_are_adapted_by_name() -> None:
    weights = {name.partition(".mlp.")[2] for name in adapted_weights(adapted("qwen3_moe", "all-experts"))}
    assert weights == {"experts.gate_up_proj", "experts.down_proj"}
    lm = adapted("gpt_oss", "q_proj", "experts.down_proj")
    assert {name.partition("layers.")[2][2:] for name in adapted_weights(lm)} == {
        "self_attn.q_proj.weight",
        "mlp.experts.down_proj",
    }
    (layer, *_) = (x for name, x in adapted_weights(lm).items() if "experts" in name)
    assert (layer.lora_A.default.weight.shape, layer.lora_B.default.weight.shape) == ((2 * 4, 96), (64, 2 * 4))
    assert {x.dtype for x in lm.parameters()} == {torch.float32}


def test_experts_that_are_not_there() -> None:
    said = r"^actor.lora.target_modules has experts.up_proj, but Qwen3MoeForCausalLM has none: the weights of its"
    with pytest.raises(ConfigError, match=said):
        adapted("qwen3_moe", "q_proj", "experts.up_proj")
    with pytest.raises(ConfigError, match=r"^actor.lora.target_modules has all-experts, but Llama.* it has no experts"):
        layers("all-linear", "all-experts")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["actor.ep_size=2"],
            "actor.lora.target_modules has experts.down_proj, but actor.ep_size=2 splits the experts",
        ),
        (
            ["rollout.engine=vllm", "rollout.vllm.lora=adapter"],
            "rollout.vllm.lora=adapter: actor.lora.target_modules has experts.down_proj, and servers add adapters only",
        ),
    ],
)
def test_adapters_on_experts_are_neither_split_nor_sent_alone(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        load("ppo", [*SETTINGS.split(), *overrides])
