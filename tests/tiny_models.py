"""Tiny random models of every causal language model in transformers, large enough in their weights to show mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LIMITS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "hidden_size_per_layer_input": 16,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "sliding_window": 16,
}
"""Largest values where a type has larger ones by default: so that windows and chunks end within a short sequence."""
OMITTED = ...
"""In place of a size: the type is better off without it."""
MLA = {
    "head_dim": OMITTED,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
WINDOW = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": {**LINEAR, "num_key_value_heads": 4},
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 16},
    "cohere2": WINDOW,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {**MLA, "first_k_dense_replace": 2, "n_routed_experts": 4},
    "deepseek_v3": {**MLA, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "deepseek_v32": {**MLA, "first_k_dense_replace": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "exaone4": WINDOW,
    "gemma3_text": WINDOW,
    "granitemoe_swa": {"attention_multiplier": 1 / 16},  # as published, 1 / head size; by default it is 1
    "granitemoehybrid": LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**LINEAR, "num_key_value_heads": 4},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "olmo3": WINDOW,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "emu3": {"text_config": {**SIZES, "head_dim": 16}},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": {**MLA, "first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_hidden_layers": OMITTED},
    "gptj": {"rotary_dim": 16},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_key_value_heads": 4, "num_layers": 1, "num_hidden_layers": OMITTED, "head_dim": OMITTED},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": {**MLA, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "plbart": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "whisper": {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
    "xlnet": {"d_head": 16},
    "youtu": MLA,
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}
"""What a type needs beside SIZES, or in their place."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3, experts": ("deepseek_v3", {"first_k_dense_replace": 1, "num_experts_per_tok": 2}),
    "exaone4, no window": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "gemma, dropout 0.5": ("gemma", {"attention_dropout": 0.5}),
    "granite, logits_scaling 8": ("granite", {"logits_scaling": 8.0}),
    "granitemoehybrid, attention alone": (
        "granitemoehybrid",
        {"num_local_experts": 0, "layer_types": ["full_attention"] * 2, "shared_intermediate_size": 96},
    ),
    "granitemoehybrid, mamba": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "layer_types": ["linear_attention", "full_attention"],
            "mamba_n_heads": 8,
            "shared_intermediate_size": 96,
        },
    ),
    "llama, dynamic rope": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 64,
        },
    ),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "phi3, dropout 0.5": ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0 + 1.5 * i for i in range(8)],
                "original_max_position_embeddings": 64,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "seed_oss, dropout 0.5": ("seed_oss", {"residual_dropout": 0.5, "attention_dropout": 0.5}),
    "starcoder2, dropout 0.5": ("starcoder2", {"residual_dropout": 0.5, "embedding_dropout": 0.5}),
}
"""Models of a type whose settings decide whether they are exact: name -> (type, settings)."""


def tiny_config(model_type: str, settings: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Return a configuration of `model_type` with SIZES, LIMITS, as far as it knows them, OVERRIDES and `settings`."""
    of = CONFIG_MAPPING[model_type]
    usual = of()
    known = set(usual.to_dict()) | set(getattr(of, "attribute_map", {}))
    sizes = {name: size for name, size in SIZES.items() if name in known}
    values = usual.to_dict()
    values |= {name: values.get(of_other) for name, of_other in getattr(of, "attribute_map", {}).items()}
    sizes |= {name: most for name, most in LIMITS.items() if _is_above(most, values.get(name))}
    wanted = {**sizes, **OVERRIDES.get(model_type, {}), **(settings or {})}
    if "vocab_size_per_layer_input" in known:  # a second table of embeddings
        wanted["vocab_size_per_layer_input"] = wanted["vocab_size"]
    return of(**{name: x for name, x in wanted.items() if x is not OMITTED})


def _is_above(most: int, size: object) -> bool:
    return isinstance(size, int) and size > most


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a causal language model with weights that are large enough for a mistake to change log-probabilities."""
    torch.manual_seed(0)
    return with_large_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def with_large_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return `model` with random weights that are large enough for a mistake to change log-probabilities."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape) * 0.25)
            elif "norm" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()
