"""Names of dtypes in the configuration."""

from __future__ import annotations

import torch


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the forward pass that the configuration calls `name`: auto, float32 or bfloat16."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
