"""Loading of models from safetensors: built on the meta device, then each process reads only the pieces it holds."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

from RL2.errors import ModelError, first_line
from RL2.models.conversion import Conversion, conversions
from RL2.models.inspection import refuse_inexact, stored_buffers
from RL2.models.lora import merged_name
from RL2.models.multimodal import checkpoint_config, multimodal, note_checkpoint, refuse_other_text, text_part
from RL2.models.quantised import method_of, note_quantisation, quantisation_of, take_quantisation, with_scales
from RL2.models.stored import FLOATS, Stored, is_equal, read_value, refuse_not_finite, stored_tensors
from RL2.models.structure import reset_buffers
from RL2.ops.attention import IMPLEMENTATION

HUB_TIMEOUT_S = 5
"""Seconds within which the hub must answer whether it has a model."""
Initial = Callable[[str, torch.Size], Tensor | None]
"""Function from (name, shape) of a parameter that a checkpoint lacks to its initial value; None if it is required."""


FORMER_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Patterns of names that old checkpoints store and that are computed today."""
PROCESSOR_FILES = ("*processor_config.json", LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)
"""Patterns of the files of a multimodal model's processor."""


def build(auto: type, model_name: str, dequantize: bool = False, **settings: object) -> PreTrainedModel:
    """Return the model of a hub name or folder, built by the auto class `auto`: float32, on the meta device.

    It calls packed attention where that is exact. `dequantize` lets its checkpoint be quantised. Raise ModelError if
    there is no such model, or if it is neither exact packed nor row by row.
    """
    refuse_no_model(model_name)
    whole = _configuration(model_name, **settings)
    quantisation = take_quantisation(whole, model_name) if dequantize else None
    config = text_part(whole)
    if config is not whole:
        config.update(settings)
    packed = refuse_inexact(auto, config, model_name) is None
    lm = empty(auto, config, torch.float32, packed)
    if config is not whole:
        note_checkpoint(lm, whole)
        refuse_other_text(lm)
    if quantisation is not None:
        note_quantisation(lm, quantisation)
    if (generation := _generation(model_name)) is not None:
        lm.generation_config = generation
    return lm


def configuration(model_name: str) -> PretrainedConfig:
    """Return the configuration of a hub name or folder, or of its text model if it is multimodal.

    Raise ModelError if it cannot be read.
    """
    return text_part(_configuration(model_name))


def is_quantised(model_name: str) -> bool:
    """Return whether a model's checkpoint is quantised. Raise ModelError if its configuration cannot be read."""
    return method_of(_configuration(model_name)) is not None


def _configuration(model_name: str, **settings: object) -> PretrainedConfig:
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


def empty(auto: Any, config: PretrainedConfig, dtype: torch.dtype, packed: bool) -> PreTrainedModel:
    """Return a model on the meta device, with packed attention or its own; it gets its own copy of `config`."""
    with torch.device("meta"):
        attention = IMPLEMENTATION if packed else None
        return auto.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)


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
    folder = weights_folder(model_name, () if checkpoint_config(lm) is None else PROCESSOR_FILES)
    stored = tensors_for(lm, folder, model_name)
    reader = HuggingFaceStorageReader(str(folder))
    reader.fs = _Listing({one.file for one in stored.values()})
    match = match_weights(lm, stored, model_name, initial, unread)
    for tensor, value in match.values:
        _set(tensor, value)
    plain = {name: tensor for name, tensor in match.state.items() if stored[name].scale is None}
    try:
        with warnings.catch_warnings(action="ignore"):  # about reading without the other processes
            dcp.load(plain, storage_reader=reader, no_dist=True)
        _convert(lm, match, stored, model_name)
    except (dcp.CheckpointException, ValueError, SafetensorError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise ModelError(f"{model_name}: its weights cannot be read: {first_line(cause)}") from error
    for name, tensor in plain.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        refuse_not_finite(name, local, stored[name], model_name)


def tensors_for(lm: PreTrainedModel, folder: Path, model_name: str) -> dict[str, Stored]:
    """Return the tensors in a folder's safetensors by name, with scales if `lm` reads a quantised checkpoint."""
    return with_scales(stored_tensors(folder, model_name), quantisation_of(lm), model_name)


def _convert(lm: PreTrainedModel, match: Match, stored: dict[str, Stored], model_name: str) -> None:
    """Fill the parameters that are quantised or stored in another layout.

    Each process reads the whole tensors of one parameter or conversion at a time.
    """

    def read(name: str) -> Tensor:
        value = read_value(name, stored[name])
        refuse_not_finite(name, value, stored[name], model_name)
        return value

    with torch.no_grad():
        for name, tensor in match.state.items():
            if stored[name].scale is not None:
                _set(tensor, read(name))
        for conversion, tensors in match.converted:
            for name, value in conversion(lm, read).items():
                _set(tensors[name], value)


@dataclass
class Match:
    """Parameters and buffers of a model, each with the stored tensors that fill it."""

    state: dict[str, Tensor] = field(default_factory=dict)
    """Stored name -> parameter or buffer in the same layout."""
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Parameters that the checkpoint lacks, with their initial values."""
    converted: list[tuple[Conversion, dict[str, Tensor]]] = field(default_factory=list)
    """Conversions from another layout, with the tensors that they fill, by name."""

    @property
    def names(self) -> list[str]:
        """Stored names that are read."""
        return [*self.state, *(name for conversion, _ in self.converted for _, name in conversion.sources)]


def match_weights(
    lm: PreTrainedModel,
    stored: dict[str, Stored],
    model_name: str,
    initial: Initial = lambda name, shape: None,
    unread: tuple[str, ...] = (),
) -> Match:
    """Find the stored tensors of each parameter and buffer of `lm`.

    Only the headers are read, except for tied weights that are stored twice. `initial` gives the values of parameters
    that may be missing; `unread` are patterns of stored names to ignore. Raise ModelError if the files lack a tensor,
    hold one of another shape, an unused one, a quantised one, or two different values of a tied weight.
    """
    match = Match()
    lacking: dict[str, Tensor] = {}
    read: set[str] = set()
    whole = multimodal(lm)
    named = {name: name for name in stored} if whole is None else whole.split(stored)[0]  # as if the text were alone

    def find(names: list[str], tensor: Tensor) -> bool:
        spellings = dict.fromkeys(chain.from_iterable(map(_spellings, names)))
        found = [named[name] for name in spellings if name in named]
        if found:
            read.update(found)
            _refuse_another_value(found, stored, model_name)
            _refuse_other_numbers(found[0], stored[found[0]], tensor, model_name)
            match.state[found[0]] = tensor
        return bool(found)

    for names, parameter in _parameters(lm):
        if find(names, parameter):
            continue
        if (value := initial(names[0], parameter.shape)) is not None:
            match.values.append((parameter, value))
        else:
            lacking[merged_name(names[0])] = parameter
    lacking |= {name: buffer for name, buffer in stored_buffers(lm).items() if not find([name], buffer)}
    if lacking:
        _match_other_layout(lm, named, stored, lacking, match, model_name)
        read.update(match.names)
    if lacking:
        raise ModelError(
            f"{model_name} lacks {len(lacking)} of the tensors of {type(lm).__name__}, among them {next(iter(lacking))}"
        )
    ignored = [*(lm._keys_to_ignore_on_load_unexpected or ()), *FORMER_BUFFERS, *unread]
    left = [name for name in named if named[name] not in read and not any(re.search(each, name) for each in ignored)]
    if left:
        raise ModelError(
            f"{model_name} has {len(left)} tensors that {type(lm).__name__} does not read, among them {left[0]}: it is "
            "a different model, or stored in a layout that is not supported"
        )
    return match


def _match_other_layout(
    lm: PreTrainedModel,
    named: dict[str, str],
    stored: dict[str, Stored],
    lacking: dict[str, Tensor],
    match: Match,
    model_name: str,
) -> None:
    """Move to `match` what is `lacking` under its own name, and stored in a layout that transformers converts.

    `named` is name in a checkpoint of `lm` alone -> stored name.
    """
    renamed, found = conversions(lm, lacking, [name for name, each in named.items() if each not in match.state])
    for other_name, name in renamed.items():
        if name in lacking:
            stored_name = named[other_name]
            tensor = match.state[stored_name] = lacking.pop(name)
            _refuse_other_numbers(stored_name, stored[stored_name], tensor, model_name)
    for conversion in found:
        conversion.sources[:] = [(pattern, named[name]) for pattern, name in conversion.sources]
        of = [name for _, name in conversion.sources]
        try:
            computed = conversion(lm, lambda name: torch.empty(stored[name].shape, device="meta"))
        except (RuntimeError, ValueError, IndexError, KeyError) as error:
            raise ModelError(f"{model_name}: {of[0]} and others do not fit together: {first_line(error)}") from error
        if not computed.keys() <= lacking.keys():
            continue  # they are reported as tensors that the model does not read
        tensors = {name: lacking.pop(name) for name in computed}
        for name, tensor in tensors.items():
            for each in of:
                whole = replace(stored[each], shape=tuple(computed[name].shape))
                _refuse_other_numbers(f"{each} (for {name})", whole, tensor, model_name)
        match.converted.append((conversion, tensors))


def _refuse_other_numbers(name: str, found: Stored, tensor: Tensor, model_name: str) -> None:
    if tensor.is_floating_point() and found.dtype not in FLOATS and found.scale is None:
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
        if not is_equal(names[0], stored[names[0]], other, stored[other]):
            raise ModelError(
                f"{model_name}: {names[0]} and {other} are tied (tie_word_embeddings) but have different values; "
                "set tie_word_embeddings to false in config.json to keep both"
            )


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


def weights_folder(model_name: str, also: tuple[str, ...] = ()) -> Path:
    """Return the folder of a model's weight files, downloading them from the hub if needed.

    `also` are patterns of other files to download.
    """
    if Path(model_name).is_dir():
        return Path(model_name)
    try:
        return Path(snapshot_download(model_name, allow_patterns=["*.safetensors", "*.safetensors.index.json", *also]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"{model_name}: {first_line(error)}") from error
