"""Loading of models from safetensors: built on the meta device, then each process reads only the pieces it holds."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from RL2.errors import ModelError, first_line
from RL2.models.inspection import refuse_inexact, reset_buffers, stored_buffers
from RL2.models.lora import merged_name
from RL2.ops.attention import IMPLEMENTATION

HUB_TIMEOUT_S = 5
"""Seconds within which the hub must answer whether it has a model."""
Initial = Callable[[str, torch.Size], Tensor | None]
"""Function from (name, shape) of a parameter that a checkpoint lacks to its initial value; None if it is required."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, described by its header."""

    file: Path
    dtype: str
    """Type as safetensors names it: F32, BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]


FLOATS = {"F64", "F32", "F16", "BF16"}
"""Stored types with plain values; others need the scales of a quantised checkpoint."""
FORMER_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Patterns of names that old checkpoints store and that are computed today."""
READ_AT_ONCE = 2**24
"""Number of values of a stored tensor that are read at a time."""


def build(auto: type, model_name: str, **settings: object) -> PreTrainedModel:
    """Return the model of a hub name or folder, built by the auto class `auto`: float32, on the meta device.

    Raise ModelError if there is no such model, or if it is not known to be exact under packing.
    """
    refuse_no_model(model_name)
    config = configuration(model_name, **settings)
    refuse_inexact(auto, config, model_name)
    lm = empty(auto, config, torch.float32)
    if (generation := _generation(model_name)) is not None:
        lm.generation_config = generation
    return lm


def configuration(model_name: str, **settings: object) -> PretrainedConfig:
    """Return the configuration of a hub name or folder. Raise ModelError if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(model_name, **settings)
    except Exception as error:  # transformers raises a type of its own for each kind of damage
        raise ModelError(f"{model_name}: its configuration cannot be read: {first_line(error)}") from error


def _generation(model_name: str) -> GenerationConfig | None:
    """Return the generation configuration of a model, which names the tokens that end a response; None without one.

    Raise ModelError if it is damaged.
    """
    try:
        found = GenerationConfig.from_pretrained(model_name)
    except Exception as error:
        here = folder_here(model_name)
        if isinstance(error, OSError) and not (here and (here / GENERATION_CONFIG_NAME).is_file()):
            return None
        raise ModelError(f"{model_name}: its {GENERATION_CONFIG_NAME} cannot be read: {first_line(error)}") from error
    ends = found.eos_token_id
    if not all(isinstance(token, int) for token in (ends if isinstance(ends, list) else [ends or 0])):
        raise ModelError(f"{model_name}: eos_token_id={ends!r} in its {GENERATION_CONFIG_NAME} is no token id")
    return found


def empty(auto: Any, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model on the meta device that calls packed attention; it gets its own copy of the configuration."""
    with torch.device("meta"):
        return auto.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=IMPLEMENTATION)


def materialise(module: nn.Module, lm: PreTrainedModel, device: torch.device) -> None:
    """Allocate `module`, which contains `lm`, on `device`: parameters uninitialised, buffers computed or NaN."""
    module.to_empty(device=device)
    lm.tie_weights()
    reset_buffers(lm)


def read_weights(
    lm: PreTrainedModel,
    model_name: str,
    initial: Initial = lambda name, shape: None,
    unread: tuple[str, ...] = (),
) -> None:
    """Fill the parameters (whole or sharded) and stored buffers of `lm` from the safetensors of a hub name or folder.

    Each process reads only its own pieces, directly from the files. Raise ModelError if a file is missing or broken,
    or if `match_weights` refuses the files.
    """
    folder = weights_folder(model_name)
    stored = stored_tensors(folder, model_name)
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = _Listing({one.file for one in stored.values()})
    state, values = match_weights(lm, stored, model_name, initial, unread)
    for tensor, value in values:
        _set(tensor, value)
    try:
        with warnings.catch_warnings(action="ignore"):  # about reading without the other processes
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (dcp.CheckpointException, ValueError, SafetensorError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise ModelError(f"{model_name}: its weights cannot be read: {first_line(cause)}") from error
    for name, tensor in state.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        _refuse_not_finite(name, local, stored[name], model_name)


def check_values(state: dict[str, Tensor], stored: dict[str, Stored], model_name: str) -> Iterator[int]:
    """Read the stored tensors that fill `state` piece by piece, and yield the number of bytes of each piece.

    Raise ModelError for a value that is NaN or infinite.
    """
    for file in sorted({stored[name].file for name in state}):
        with safe_open(file, framework="pt") as opened:
            for name in (name for name in state if stored[name].file == file):
                for piece in _pieces(opened.get_slice(name), stored[name].shape):
                    _refuse_not_finite(name, piece, stored[name], model_name)
                    yield piece.nbytes


def _refuse_not_finite(name: str, values: Tensor, stored: Stored, model_name: str) -> None:
    if values.numel() and values.is_floating_point() and not torch.stack(torch.aminmax(values)).isfinite().all():
        raise ModelError(
            f"{model_name}: {name} in {stored.file.name} has values that are NaN or infinite: the weights are broken; "
            "use another checkpoint"
        )


def match_weights(
    lm: PreTrainedModel,
    stored: dict[str, Stored],
    model_name: str,
    initial: Initial = lambda name, shape: None,
    unread: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Return stored name -> parameter or buffer of `lm` to fill, and the pairs of parameters and initial values.

    Only the headers are read, except for tied weights that are stored twice. `initial` gives the values of parameters
    that may be missing; `unread` are patterns of stored names to ignore. Raise ModelError if the files lack a tensor,
    hold one of another shape, an unused one, a quantised one, or two different values of a tied weight.
    """
    state: dict[str, Tensor] = {}
    values: list[tuple[Tensor, Tensor]] = []
    lacking: list[str] = []
    read: set[str] = set()

    def find(names: list[str], tensor: Tensor) -> bool:
        found = [name for name in dict.fromkeys(chain.from_iterable(map(_spellings, names))) if name in stored]
        if found:
            read.update(found)
            _refuse_another_value(found, stored, model_name)
            _refuse_other_numbers(found[0], stored[found[0]], tensor, model_name)
            state[found[0]] = tensor
        return bool(found)

    for names, parameter in _parameters(lm):
        if find(names, parameter):
            continue
        if (value := initial(names[0], parameter.shape)) is not None:
            values.append((parameter, value))
        else:
            lacking.append(names[0])
    lacking += [name for name, buffer in stored_buffers(lm).items() if not find([name], buffer)]
    if lacking:
        raise ModelError(
            f"{model_name} lacks {len(lacking)} of the tensors of {type(lm).__name__}, among them {lacking[0]}"
        )
    ignored = [*(lm._keys_to_ignore_on_load_unexpected or ()), *FORMER_BUFFERS, *unread]
    left = [name for name in stored if name not in read and not any(re.search(pattern, name) for pattern in ignored)]
    if left:
        raise ModelError(
            f"{model_name} has {len(left)} tensors that {type(lm).__name__} does not read, among them {left[0]}: it is "
            "a different model, or stored in a layout that is not supported"
        )
    return state, values


def _refuse_other_numbers(name: str, found: Stored, tensor: Tensor, model_name: str) -> None:
    if tensor.is_floating_point() and found.dtype not in FLOATS:
        raise ModelError(
            f"{model_name}: {name} is stored as {found.dtype} ({found.file.name}): the model is quantised, and its "
            "scales would be lost; use a checkpoint in bfloat16 or float32"
        )
    if found.shape != tuple(tensor.shape):
        raise ModelError(
            f"{model_name}: {name} has shape {list(found.shape)} in {found.file.name}, but {list(tensor.shape)} in "
            "config.json"
        )


def _refuse_another_value(names: list[str], stored: dict[str, Stored], model_name: str) -> None:
    """Raise ModelError if a tied weight is stored under two names with different values: one would be lost."""
    for other in names[1:]:
        if not _equal(names[0], stored[names[0]], other, stored[other]):
            raise ModelError(
                f"{model_name}: {names[0]} and {other} are tied (tie_word_embeddings) but have different values; "
                "set tie_word_embeddings to false in config.json to keep both"
            )


def _equal(name: str, one: Stored, other_name: str, other: Stored) -> bool:
    """Compare two stored tensors piece by piece."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with safe_open(one.file, framework="pt") as a, safe_open(other.file, framework="pt") as b:
        left, right = (_pieces(opened.get_slice(key), one.shape) for opened, key in ((a, name), (b, other_name)))
        return all(map(torch.equal, left, right))


def _pieces(stored: Any, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield the rows of a slice of `safe_open`, at most `READ_AT_ONCE` values at a time."""
    if not shape:
        yield stored[...]
        return
    rows = max(1, READ_AT_ONCE // max(1, math.prod(shape[1:])))
    for i in range(0, shape[0], rows):
        yield stored[i : i + rows]


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


class _Listing(FileSystem):
    """A file system whose folders contain exactly these files."""

    def __init__(self, files: set[Path]) -> None:
        self.files = files

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(file) for file in self.files]


def _parameters(lm: PreTrainedModel) -> list[tuple[list[str], Tensor]]:
    """Return each parameter with all its names; a tied parameter has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [(all_names, parameter.detach()) for parameter, all_names in names.items()]


def _spellings(name: str) -> tuple[str, ...]:
    """Return the names under which a parameter may be stored, without peft's wrapping.

    A backbone that was saved alone has no `model.` prefix.
    """
    name = merged_name(name)
    return (name, name.removeprefix("model."))


def _set(tensor: Tensor, value: Tensor) -> None:
    """Set `tensor`, which may be sharded, to `value`, which is whole on every process."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def folder_here(model_name: str) -> Path | None:
    """Return the local folder of a model, given as a path or found in the hub's cache; None if it must be downloaded.

    Raise ValueError for a name that is neither a folder nor a valid hub name.
    """
    if Path(model_name).is_dir():
        return Path(model_name)
    config = try_to_load_from_cache(model_name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def refuse_no_model(model_name: str) -> None:
    """Raise ModelError if the model is neither a local folder nor on the hub; a download would retry for a minute."""
    if Path(model_name).is_dir():
        if not (Path(model_name) / "config.json").is_file():
            raise ModelError(f"{model_name} is not a model: it has no config.json{_exportable(Path(model_name))}")
        for path in Path(model_name).iterdir():
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ModelError(
                    f"{model_name}: {path.name} is a pipe, a socket or a device, and reading it may "
                    "block forever; remove it"
                )
        return
    try:
        here = folder_here(model_name)
    except ValueError as error:
        raise ModelError(
            f"{model_name}: there is no such folder, and a model on the hub is named OWNER/NAME"
        ) from error
    try:
        if here is None:
            HfApi().model_info(model_name, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # no such name, no network, a proxy: the client raises a type of its own for each
        raise ModelError(
            f"{model_name}: there is no such folder, and the hub does not provide it: {first_line(error)}"
        ) from error


def _exportable(folder: Path) -> str:
    """Return how to make a model of a checkpoint or an adapter, for an error; '' if the folder is neither."""
    if re.fullmatch(r"step_[0-9]+", folder.name):
        return f"; it is a checkpoint, of which `rl2 export {folder} OUT` makes a model"
    if (folder / "adapter_config.json").is_file():
        return "; it is an adapter: `rl2 export` of the checkpoint, without --adapter, merges it into its base"
    return ""


def weights_folder(model_name: str) -> Path:
    """Return the folder of a model's weight files, downloading them from the hub if needed."""
    if Path(model_name).is_dir():
        return Path(model_name)
    try:
        return Path(snapshot_download(model_name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"{model_name}: {first_line(error)}") from error
