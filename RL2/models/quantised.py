"""Quantised checkpoints whose weights are values with scales: FP8 and int8. Read as value * scale, on request.

A scale belongs to a block of the weight, to a row, or to the whole tensor. Scales of activations are not read: training
computes activations in the compute dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from RL2.errors import ModelError
from RL2.models.stored import FLOATS, Scale, Stored

READABLE = ("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt")
"""Methods (`quant_method`) that store FP8 or int8 values with their scales."""
FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
"""Formats of compressed-tensors that store one value per weight."""
QUANTISED = ("F8_E4M3", "F8_E5M2", "I8")
"""Stored types of quantised values."""
SCALES = FLOATS | {"F8_E8M0"}
"""Stored types of scales. Integers may stand for exponents."""
OF_ACTIVATIONS = r"[._](input|activation|output|[qkv])_scale(_ub)?$"
"""Pattern of the names of scales that belong to no weight."""
NOTE = "_rl2_quantisation"
"""Attribute of a model: the `Quantisation` of its checkpoint."""


@dataclass(frozen=True)
class Quantisation:
    """The way in which a checkpoint is quantised."""

    method: str
    block: tuple[int, int] | None
    """Rows and columns of a block with one scale, if that is neither a row nor the tensor; None if not given."""


def method_of(config: PretrainedConfig) -> str | None:
    """Return the method by which the checkpoint of `config` is quantised; None if it is not."""
    settings = _settings(config)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    return str(method or "quantization_config")


def note_quantisation(lm: PreTrainedModel, quantisation: Quantisation) -> None:
    """Note in `lm` how its checkpoint is quantised."""
    vars(lm)[NOTE] = quantisation


def quantisation_of(lm: PreTrainedModel) -> Quantisation | None:
    """Return how the checkpoint of `lm` is quantised; None if it is not."""
    return vars(lm).get(NOTE)


def quantised_line(lm: PreTrainedModel) -> str | None:
    """Return the line that a run prints about the model of a quantised checkpoint; None for another one."""
    found = quantisation_of(lm)
    if found is None:
        return None
    return f"its {found.method} weights are read as value * scale, and an export is not quantised"


def take_quantisation(config: PretrainedConfig, model_name: str) -> Quantisation:
    """Remove the settings of quantisation from `config`, and return them.

    Raise ModelError if the checkpoint is not quantised, or in a way that `with_scales` does not read.
    """
    settings, method = _settings(config), method_of(config)
    if method is None:
        raise ModelError(
            f"{model_name}: dequantize=true has no effect, because config.json has no quantization_config; set "
            "dequantize=false"
        )
    why = "" if method in READABLE else f"{method} stores no FP8 or int8 value with a scale for each weight"
    if not isinstance(settings, Mapping):
        why = why or "its quantization_config is no mapping"
    elif method == "compressed-tensors":
        why = _why_not_compressed(settings)
    if why:
        raise ModelError(
            f"{model_name}: dequantize=true cannot read its weights: {why}; use a checkpoint in bfloat16 or float32"
        )
    assert isinstance(settings, Mapping)
    parts: list[Any] = [config, getattr(config, "text_config", None)]
    for part in parts:
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    if method == "compressed-tensors":
        sizes = _group_sizes(settings)
        return Quantisation(method, (1, sizes[0]) if sizes else None)
    return Quantisation(method, _block(settings, model_name) if method == "fp8" else None)


def _settings(config: PretrainedConfig) -> Any:
    """Return the settings of quantisation, of the whole model or of its text; None if there are none."""
    found = getattr(config, "quantization_config", None)
    return found if found is not None else getattr(getattr(config, "text_config", None), "quantization_config", None)


def _block(settings: Mapping[str, Any], model_name: str) -> tuple[int, int] | None:
    block = settings.get("weight_block_size", (128, 128))  # transformers' default
    if block is None:
        return None
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(x, int) and x > 0 for x in block)):
        raise ModelError(f"{model_name}: weight_block_size={block!r} in config.json must be two positive integers")
    return block[0], block[1]


def _group_sizes(settings: Mapping[str, Any]) -> list[int]:
    """Return the different numbers of neighbours in a row that share a scale, in a checkpoint of compressed-tensors."""
    sizes = (weights.get("group_size") or 0 for weights in _weights(settings))
    return sorted({int(size) for size in sizes if size > 0})


def _weights(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what a checkpoint of compressed-tensors says of the weights of each group of layers."""
    return [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]


def _why_not_compressed(settings: Mapping[str, Any]) -> str:
    """Return why a checkpoint of compressed-tensors cannot be read; '' if it can."""
    groups = _weights(settings)
    used = {settings.get("format"), *(group.get("format") for group in (settings.get("config_groups") or {}).values())}
    if unknown := sorted(str(each) for each in used - {*FORMATS, None}):
        return f"its format {unknown[0]} packs its values"
    if any(weights.get("num_bits", 8) != 8 for weights in groups):
        return "its values have another size than 8 bits"
    if any(weights.get("symmetric") is False for weights in groups):
        return "its values have zero points"
    if any(weights.get("strategy") == "block" for weights in groups):
        return "its scales belong to blocks, which is supported for quant_method=fp8 alone"
    if len(_group_sizes(settings)) > 1:
        return "its scales belong to groups of several sizes"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "its weights are sparse"
    return "its weights are transformed" if settings.get("transform_config") else ""


def with_scales(stored: dict[str, Stored], quantisation: Quantisation | None, model_name: str) -> dict[str, Stored]:
    """Return the stored tensors, each quantised one with its scale, without the scales themselves.

    The scale of NAME is NAME_scale_inv or NAME_scale. Raise ModelError if it has another shape than the weight's blocks
    need.
    """
    if quantisation is None:
        return stored
    found = dict(stored)
    for name, each in stored.items():
        scale_name = next((key for key in (f"{name}_scale_inv", f"{name}_scale") if key in stored), None)
        if each.dtype in QUANTISED and scale_name is not None:
            scale = _scale(scale_name, stored[scale_name], each.shape, quantisation.block)
            if scale is None:
                raise ModelError(
                    f"{model_name}: {scale_name} has shape {list(stored[scale_name].shape)}, which does not fit "
                    f"{name} of shape {list(each.shape)} (weight_block_size={quantisation.block})"
                )
            if scale.stored.dtype not in SCALES:
                raise ModelError(f"{model_name}: {scale_name} is stored as {scale.stored.dtype}, not as a number")
            found[name] = replace(each, scale=scale)
            del found[scale_name]
    return {name: each for name, each in found.items() if not re.search(OF_ACTIVATIONS, name)}


def _scale(name: str, stored: Stored, shape: tuple[int, ...], block: tuple[int, int] | None) -> Scale | None:
    """Return the scale of a weight of this shape; None if their shapes do not fit.

    The size of a block that is neither one row or column nor all is `block`: two scales of 96 columns may belong to
    blocks of 48 or of 64.
    """
    grid = stored.shape
    if prod(grid) == 1:
        grid = (1,) * len(shape)
    elif len(grid) == 1:
        grid = (*grid, *[1] * (len(shape) - 1))
    if len(grid) != len(shape):
        return None
    given = (*[0] * (len(shape) - 2), *(block or (0, 0)))[-len(shape) :] if shape else ()
    blocks = []
    for size, number, of in zip(shape, grid, given, strict=True):
        whole = {1: size, size: 1}.get(number, of)
        if not whole or ceil(size / whole) != number:
            return None
        blocks.append(whole)
    return Scale(name, stored, grid, tuple(blocks))
