"""Quantised checkpoints made of saved models, with the weights that a reader must find, computed in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def largest(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the largest size of the values in each block of rows x columns."""
    parts = [[block.abs().max() for block in band.split(columns, -1)] for band in x.split(rows, 0)]
    return torch.tensor([[float(value) for value in band] for band in parts])


def by_hand(values: torch.Tensor, scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return value * scale in float64, rounded once."""
    spread = torch.kron(scale.double(), torch.ones(rows, columns, dtype=torch.double))
    return (values.double() * spread[: values.shape[0], : values.shape[1]]).float()


def quantise(folder: Path, settings: dict[str, Any], kind: str) -> dict[str, torch.Tensor]:
    """Quantise the linear layers of a saved model in place; return the weights that a reader must find, by name."""
    stored = load_file(folder / "model.safetensors")
    groups = settings.get("config_groups", {"none": {"weights": {}}})
    group_size = next(iter(groups.values()))["weights"].get("group_size", 0)
    wanted = {}
    for name, x in list(stored.items()):
        if not name.endswith("proj.weight") or "vis" in name or "multi_modal" in name:
            continue
        of_kind = {"block": settings.get("weight_block_size"), "tensor": x.shape, "group": (1, group_size)}
        rows, columns = of_kind.get(kind, (1, x.shape[1]))
        dtype, most = (torch.int8, 127.0) if kind == "int8" else (torch.float8_e4m3fn, 448.0)
        scale = largest(x, rows, columns) / most
        spread = scale.repeat_interleave(rows, 0)[: x.shape[0]].repeat_interleave(columns, 1)[:, : x.shape[1]]
        values = x / spread
        stored[name] = (values.round() if kind == "int8" else values).to(dtype)
        wanted[name] = by_hand(stored[name], scale, rows, columns)
        suffix = "_scale_inv" if settings["quant_method"] == "fp8" else "_scale"
        stored[name + suffix] = scale[0, 0] if kind == "tensor" else scale
        if settings.get("activation_scheme") == "static":
            stored[name.replace(".weight", ".activation_scale")] = torch.ones(())
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, quantization_config=settings)
    return wanted


def change(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
