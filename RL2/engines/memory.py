"""Memory that an engine may use, and the memory that keys and values take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PretrainedConfig


def free_bytes(device: torch.device) -> float:
    """Return the free memory of a GPU, or of the machine divided by its number of ranks."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux: half of the installed memory
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return available / here


def bytes_per_position(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Return the size of one token's keys and values over all layers."""
    return bytes_per_row(config, dtype, {}, 1)


def bytes_per_row(config: PretrainedConfig, dtype: torch.dtype, windows: Mapping[int, int], length: int) -> int:
    """Return the size of the keys and values of `length` tokens over all layers.

    `windows` is number of a layer -> positions that it keeps, for the layers that do not keep all.
    """
    return dtype.itemsize * sum(
        layer.num_key_value_heads * _key_and_value(layer) * min(length, windows.get(number, length))
        for number, layer in enumerate(config.per_layer_config)
    )


def _key_and_value(layer: PretrainedConfig) -> int:
    """Return the number of values of one head's key and value in a layer."""
    if hasattr(layer, "qk_nope_head_dim"):  # multi-head latent attention, whose keys and values are cached whole
        return int(layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim)
    return 2 * int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
