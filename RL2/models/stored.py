"""Tensors in safetensors files: headers first, then values piece by piece, with their scales if they are quantised."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from RL2.errors import ModelError, first_line

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of stored tensors by safetensors' names."""
FLOATS = {"F64", "F32", "F16", "BF16"}
"""Stored types with plain values; others need the scales of a quantised checkpoint."""
READ_AT_ONCE = 2**24
"""Number of values of a stored tensor that are read at a time."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, described by its header."""

    file: Path
    dtype: str
    """Type as safetensors names it: F32, BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    scale: Scale | None = None
    """Factors of its values, if it is quantised and read with them."""


@dataclass(frozen=True)
class Scale:
    """The factors of a quantised tensor, one for each block of its values."""

    name: str
    stored: Stored
    grid: tuple[int, ...]
    """Number of blocks along each dimension of the tensor."""
    blocks: tuple[int, ...]
    """Size of a block along each dimension; the last block of a dimension may be smaller."""

    def read(self) -> Tensor:
        """Return the factors, float32 of the shape `grid`."""
        with safe_open(self.stored.file, framework="pt") as opened:
            return opened.get_tensor(self.name).float().view(self.grid)

    def apply(self, values: Tensor, factors: Tensor, first_row: int) -> Tensor:
        """Return rows of the tensor, from `first_row` on, multiplied by their `factors`, in float32."""
        for dim, size in enumerate(values.shape):
            place = torch.arange(size) + (first_row if dim == 0 else 0)
            factors = factors.index_select(dim, place // self.blocks[dim])
        return values.float() * factors


def check_values(names: Collection[str], stored: dict[str, Stored], model_name: str) -> Iterator[int]:
    """Read the stored tensors `names` piece by piece, and yield the number of bytes of each piece.

    Raise ModelError for a value that is NaN or infinite.
    """
    for file in sorted({stored[name].file for name in names}):
        with safe_open(file, framework="pt") as opened:
            for name in (name for name in names if stored[name].file == file):
                for piece in _pieces(opened.get_slice(name), stored[name]):
                    refuse_not_finite(name, piece, stored[name], model_name)
                    yield piece.nbytes if stored[name].scale is None else piece.numel()  # a byte each


def read_value(name: str, stored: Stored) -> Tensor:
    """Return a whole stored tensor as it is, or multiplied by its scale, in float32, if it has one."""
    with safe_open(stored.file, framework="pt") as opened:
        if stored.scale is None:
            return cast(Tensor, opened.get_tensor(name))
        value = torch.empty(stored.shape)
        rows = value.split(_rows(stored.shape)) if stored.shape else (value,)
        for part, piece in zip(rows, _pieces(opened.get_slice(name), stored), strict=True):
            part.copy_(piece)
        return value


def refuse_not_finite(name: str, values: Tensor, stored: Stored, model_name: str) -> None:
    """Raise ModelError if a value of a stored tensor is NaN or infinite."""
    if values.numel() and values.is_floating_point() and not torch.stack(torch.aminmax(values)).isfinite().all():
        raise ModelError(
            f"{model_name}: {name} in {stored.file.name} has values that are NaN or infinite: the weights are broken; "
            "use another checkpoint"
        )


def is_equal(name: str, one: Stored, other_name: str, other: Stored) -> bool:
    """Return whether two stored tensors are equal; they are read piece by piece."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with safe_open(one.file, framework="pt") as a, safe_open(other.file, framework="pt") as b:
        left, right = (
            _pieces(opened.get_slice(key), each) for opened, key, each in ((a, name, one), (b, other_name, other))
        )
        return all(map(torch.equal, left, right))


def _pieces(part: Any, stored: Stored) -> Iterator[Tensor]:
    """Yield the rows of a slice of `safe_open`, at most `READ_AT_ONCE` values at a time, multiplied by their scale."""
    scale = stored.scale
    factors = None if scale is None else scale.read()
    if not stored.shape:
        value: Tensor = part[...]
        yield value if factors is None else value.float() * factors
        return
    rows = _rows(stored.shape)
    for i in range(0, stored.shape[0], rows):
        piece: Tensor = part[i : i + rows]
        yield piece if scale is None or factors is None else scale.apply(piece, factors, i)


def _rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows of a tensor that are read at a time."""
    return max(1, READ_AT_ONCE // max(1, math.prod(shape[1:])))


def stored_tensors(folder: Path, model_name: str) -> dict[str, Stored]:
    """Return the tensors in a folder's safetensors by name; only the headers are read.

    Raise ModelError, naming the file, if one is broken, if one of the index is missing, or if two hold a tensor of the
    same name.
    """
    found: dict[str, Stored] = {}
    for file in _weight_files(folder, model_name):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no dictionary
                    part = opened.get_slice(name)
                    stored = Stored(file, part.get_dtype(), tuple(part.get_shape()))
                    if name in found:
                        raise ModelError(
                            f"{model_name}: {name} is stored in {found[name].file.name} and in {file.name}; "
                            "keep only the files of one checkpoint in the folder"
                        )
                    found[name] = stored
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{model_name}: {file.name} is broken ({first_line(error)}); was a download or a copy cut off? "
                "Remove it and download it again"
            ) from error
    if not found:
        why = f"no *.safetensors in {folder}"
        if begun := list(folder.glob("../../blobs/*.incomplete")):  # `folder` is a snapshot in the hub's cache
            why = f"the download was cut off at {begun[0].name}; download it again"
        raise ModelError(f"{model_name} has no weights in safetensors format ({why})")
    return found


def _weight_files(folder: Path, model_name: str) -> list[Path]:
    """Return the files that transformers would load: `model.safetensors`, else those of the index, else all.

    The folder may also hold the weights in another library's layout, an adapter, or old shards.
    """
    if (whole := folder / SAFE_WEIGHTS_NAME).is_file():
        return [whole]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        named = sorted({str(file) for file in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{model_name}: {index.name} is broken ({first_line(error)})") from error
    if missing := [file for file in named if not (folder / file).is_file()]:
        raise ModelError(
            f"{model_name}: {missing[0]} is listed in {index.name} but missing, with {len(missing)} of {len(named)} "
            "files in all; download the model again"
        )
    return [folder / file for file in named]
