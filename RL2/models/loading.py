"""Models out of safetensors: built without memory, then each process reads the pieces of weights that it keeps."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from RL2.config import ConfigError, first_line
from RL2.models.lora import merged_name
from RL2.ops.attention import IMPLEMENTATION

HUB_TIMEOUT_S = 5
"""How long the hub may take to say whether it has a model."""
Initial = Callable[[str, torch.Size], Tensor | None]
"""(name, shape) of a parameter that a checkpoint lacks -> its first value, or None if it may not be missing."""


def build(auto: type, model_name: str, key: str, **settings: object) -> PreTrainedModel:
    """The model of a hub name or folder by `auto`, a transformers auto class: float32, on the meta device.

    `key` named the model, for errors. Raises ConfigError if there is none, or one that `auto` cannot build.
    """
    try:
        config = AutoConfig.from_pretrained(model_name, **settings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={model_name}: {first_line(error)}") from error
    lm = empty(auto, config, torch.float32)
    with suppress(OSError):  # most models bring one; without it the tokenizer alone says what ends a response
        lm.generation_config = GenerationConfig.from_pretrained(model_name)
    return lm


def empty(auto: type, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the meta device that calls packed attention."""
    with torch.device("meta"):
        return auto.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)  # type: ignore[attr-defined]


def materialise(module: nn.Module, lm: PreTrainedModel, device: torch.device) -> None:
    """Give the parameters of `module`, around `lm`, memory on `device`; their values are arbitrary."""
    module.to_empty(device=device)
    lm.tie_weights()
    for part in lm.modules():
        if any(True for _ in part.buffers(recurse=False)):
            lm._init_weights(part)  # rotary frequencies: computed from the configuration, in no checkpoint


def read_weights(lm: PreTrainedModel, model_name: str, key: str, initial: Initial = lambda name, shape: None) -> None:
    """Fill the parameters of `lm`, whole or sharded, from the safetensors of a hub name or folder.

    A process reads only its own pieces, straight from the files. Raises ConfigError if a file is missing or broken, or
    if the model has a parameter that they lack and `initial` has no value for.
    """
    folder = weights_folder(model_name, key)
    stored = stored_names(folder, model_name, key)
    state: dict[str, Tensor] = {}
    lacking: list[str] = []
    for names, tensor in _parameters(lm):
        found = next((name for name in chain.from_iterable(map(_spellings, names)) if name in stored), None)
        if found is not None:
            state[found] = tensor
        elif (value := initial(names[0], tensor.shape)) is not None:
            _set(tensor, value)
        else:
            lacking.append(names[0])
    if lacking:
        raise ConfigError(
            f"{key}={model_name} lacks weights of {len(lacking)} of {type(lm).__name__}'s parameters, "
            f"among them {lacking[0]}"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # that it reads without the other processes, which is the idea
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (dcp.CheckpointException, ValueError, SafetensorError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise ConfigError(f"{key}={model_name}: its weights cannot be read: {first_line(cause)}") from error


def stored_names(folder: Path, model_name: str, key: str) -> set[str]:
    """Names of the weights in a folder's safetensors, of which only the headers are read.

    Raises ConfigError, which names the file, if one is broken or one of those in the index is not there.
    """
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                names |= set(opened.keys())
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{key}={model_name}: {file.name} is broken ({first_line(error)}); was a download or a copy cut off? "
                "Take it out and fetch it again"
            ) from error
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{key}={model_name}: {index.name} is broken ({first_line(error)})") from error
        if missing := sorted(file for file in named if not (folder / file).is_file()):
            raise ConfigError(
                f"{key}={model_name}: {missing[0]} is missing, which {index.name} names (with it {len(missing)} of "
                f"{len(named)} files); fetch the model again"
            )
    if not names:
        why = f"no *.safetensors in {folder}"
        if begun := list(folder.glob("../../blobs/*.incomplete")):  # the hub's cache, of which `folder` is a snapshot
            why = f"the download was cut off at {begun[0].name}; fetch it again"
        raise ConfigError(f"{key}={model_name} has no weights in safetensors format ({why})")
    return names


def _parameters(lm: PreTrainedModel) -> list[tuple[list[str], Tensor]]:
    """Each parameter with all its names: a tied one has several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [(of, parameter.detach()) for parameter, of in names.items()]


def _spellings(name: str) -> tuple[str, ...]:
    """A backbone that was saved alone has no `model.` before its names, and no checkpoint has peft's wrapping."""
    name = merged_name(name)
    return (name, name.removeprefix("model."))


def _set(tensor: Tensor, value: Tensor) -> None:
    """`tensor` = `value`, which every process has whole."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(value)


def folder_here(model_name: str) -> Path | None:
    """The folder of a model that is on this machine: as it stands, or in the hub's cache; None if it is to be fetched.

    Raises ValueError for a name that is neither a folder nor one that the hub could know.
    """
    if Path(model_name).is_dir():
        return Path(model_name)
    config = try_to_load_from_cache(model_name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def refuse_no_model(model_name: str, key: str) -> None:
    """Raise ConfigError if it is neither a model's folder nor on the hub. A download would try for a minute."""
    if Path(model_name).is_dir():
        if not (Path(model_name) / "config.json").is_file():
            raise ConfigError(f"{key}={model_name} is no model: there is no config.json in it")
        return
    try:
        here = folder_here(model_name)
    except ValueError as error:
        raise ConfigError(
            f"{key}={model_name}: there is no such folder, and a model on the hub is called OWNER/NAME"
        ) from error
    try:
        if here is None:
            HfApi().model_info(model_name, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # no such name, no network, a proxy: the client has an error of its own for each
        raise ConfigError(
            f"{key}={model_name}: there is no such folder, and the hub does not give it: {first_line(error)}"
        ) from error


def weights_folder(model_name: str, key: str) -> Path:
    """Where the files are; those of the hub are fetched."""
    if Path(model_name).is_dir():
        return Path(model_name)
    try:
        return Path(snapshot_download(model_name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ConfigError(f"{key}={model_name}: {first_line(error)}") from error
