"""Tiny random multimodal models: the text model of `tiny_models`, and other parts that are as small as they can be."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_config, with_large_weights
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

TYPES = sorted({*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES})
"""Types of multimodal models with text as their output."""
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
    "embed_dim": 32,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "out_hidden_size": 64,
    "output_dim": 64,
    "num_position_embeddings": 16,
    "projection_dim": 32,
    "mlp_dim": 48,
    "width": 32,
    "layers": 2,
}
"""Sizes of the other parts, as far as their types know them."""
MARKS = ("image", "video", "audio", "vision_start", "vision_end", "boi", "eoi", "boa", "eoa")
"""Kinds of tokens that text does not have: theirs are the last ids of the vocabulary."""


def multimodal_config(model_type: str, text: dict[str, Any] | None = None) -> PretrainedConfig:
    """Return a tiny configuration of `model_type`; `text` has settings of its text model."""
    kind = CONFIG_MAPPING[model_type]
    usual = kind()
    values: dict[str, Any] = {"text_config": tiny_config(usual.text_config.model_type, text).to_dict()}
    for name in kind.sub_configs.keys() - {"text_config"}:
        if (part := getattr(usual, name, None)) is not None:
            known = {*type(part)().to_dict(), *getattr(type(part), "attribute_map", {})}
            sizes = {key: size for key, size in SMALL.items() if key in known}
            values[name] = {"model_type": part.model_type, **sizes}
    first = values["text_config"]["vocab_size"] - len(MARKS)
    for number, mark in enumerate(MARKS, start=first):
        values |= {name: number for name in (f"{mark}_token_id", f"{mark}_token_index") if hasattr(usual, name)}
    return kind(**values)


def multimodal_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a random multimodal model whose weights are large enough for a mistake to change log-probabilities."""
    in_one = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    mapping = MODEL_FOR_MULTIMODAL_LM_MAPPING if in_one else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    torch.manual_seed(0)
    return with_large_weights(mapping[type(config)]._from_config(config, dtype=torch.float32))
