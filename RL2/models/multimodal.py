"""Text models within multimodal checkpoints: their configuration, the names of their tensors, and the other parts.

A multimodal class of transformers holds the backbone of a causal language model, such as `model.language_model`, and a
head. RL2 trains the causal language model of that configuration. A checkpoint's own names follow transformers' rules
for the multimodal class; the tensors of the other parts are never loaded, and are copied into an export.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from RL2.errors import ModelError, first_line
from RL2.models.conversion import conversions
from RL2.models.inspection import logit_transform
from RL2.models.structure import decoder_layers, has_head, measured_transform

SENSES = ("vision", "audio")
"""Parts of multimodal models that are named to the user; their configurations are `vision_config`, `audio_config`."""

NOTE = "_rl2_checkpoint_config"
"""Attribute of a text model: the configuration of its multimodal checkpoint."""


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the causal language model within a multimodal `config`; else `config` itself."""
    text = getattr(config, "text_config", None)
    if text is None or _class_of(config) is None or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config
    text = copy.deepcopy(text)
    if hasattr(config, "tie_word_embeddings"):  # by which the multimodal class ties
        text.tie_word_embeddings = config.tie_word_embeddings
    if hasattr(config, "quantization_config"):
        text.quantization_config = config.quantization_config
    text.name_or_path = config.name_or_path
    return text


def note_checkpoint(lm: PreTrainedModel, config: PretrainedConfig) -> None:
    """Note in `lm` that it is the text part of a checkpoint with the multimodal `config`."""
    vars(lm)[NOTE] = config


def checkpoint_config(lm: PreTrainedModel) -> PretrainedConfig | None:
    """Return the configuration of the multimodal checkpoint that `lm` was built from; None for a text-only model."""
    return vars(lm).get(NOTE)


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the multimodal class of `config` in transformers; None for other models."""
    for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return cast(type[PreTrainedModel], mapping[type(config)])
    return None


@dataclass(frozen=True)
class Multimodal:
    """A multimodal model on the meta device, and the places of a causal language model within it."""

    model: PreTrainedModel
    modules: dict[str, str]
    """Name of a module of the language model -> its name in `model`: of the backbone, and of the head if it has one."""

    def whole_name(self, name: str) -> str:
        """Return the name in `model` of a parameter or buffer of the language model."""
        found = _moved(name, self.modules)
        if found is None:
            raise KeyError(name)
        return found

    def split(self, stored_names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """Return name in a checkpoint of the language model alone -> stored name, and the names of the other parts.

        Names that belong to neither are in the dictionary under their own name.
        """
        known, places = self.model.state_dict(), {whole: text for text, whole in self.modules.items()}
        renamings = [rule for rule in get_model_conversion_mapping(self.model) if isinstance(rule, WeightRenaming)]
        text: dict[str, str] = {}
        rest: dict[str, str] = {}
        for stored_name in stored_names:
            name, _ = rename_source_key(stored_name, renamings, [], self.model.base_model_prefix, known)
            alone = _moved(name, places)
            (rest if alone is None else text)[alone or stored_name] = stored_name
        renamed, converted = conversions(self.model, known, rest)
        others = {*renamed, *(name for conversion in converted for _, name in conversion.sources)}
        others |= {name for name in rest if any(re.search(pattern, name) for pattern in self._ignored)}
        return text | {name: name for name in rest if name not in others}, [name for name in rest if name in others]

    @property
    def _ignored(self) -> list[str]:
        """Patterns of stored names that the multimodal class does not read, such as layers that predict more tokens."""
        return list(self.model._keys_to_ignore_on_load_unexpected or ())

    def around(self, lm: PreTrainedModel) -> PreTrainedModel:
        """Return `model` with the modules of `lm` in place of its own; text never reaches its other parts."""
        self.model.eval()
        for text, whole in self.modules.items():
            self.model.set_submodule(whole, lm.get_submodule(text))
        self.model.config.text_config = lm.config  # it names the implementation of attention, for the masks
        for part in self.model.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.is_meta:  # some classes look for the device at their first parameter
                    setattr(part, name, nn.Parameter(torch.empty(0, device=lm.device), requires_grad=False))
        return self.model


def _moved(name: str, places: dict[str, str]) -> str | None:
    """Return a parameter's name after its module has moved, by `places`: module -> new name; None for other modules."""
    of = next((module for module in places if name.startswith(f"{module}.")), None)
    return None if of is None else places[of] + name.removeprefix(of)


def multimodal(lm: PreTrainedModel) -> Multimodal | None:
    """Return the multimodal model that `lm` was built from; None for a text-only model.

    Raise ModelError if it does not hold the parameters of `lm`'s backbone and head.
    """
    config = checkpoint_config(lm)
    if config is None:
        return None
    kind = _class_of(config)
    assert kind is not None
    try:
        with torch.device("meta"):
            model = kind._from_config(copy.deepcopy(config), dtype=torch.float32)
    except Exception as error:  # transformers raises a type of its own for each kind of damage
        raise ModelError(f"{lm.name_or_path}: {config.model_type} cannot be built: {first_line(error)}") from error
    return Multimodal(model, _modules(lm, model))


def refuse_other_text(lm: PreTrainedModel) -> None:
    """Raise ModelError if `lm`, as it was built, is not a part of the multimodal model of its checkpoint."""
    whole = multimodal(lm)
    if whole is None:
        return
    theirs = whole.model.state_dict()
    for text, name in whole.modules.items():
        ours = {f"{name}.{key}": x.shape for key, x in lm.get_submodule(text).state_dict().items()}
        if ours != {key: x.shape for key, x in theirs.items() if key.startswith(f"{name}.")}:
            raise ModelError(_not_a_part(lm, whole.model))
    head = lm.get_output_embeddings()
    if head is None:
        return
    is_tied = head.weight is lm.get_input_embeddings().weight
    whole_head, whole_embedding = whole.model.get_output_embeddings(), whole.model.get_input_embeddings()
    if is_tied != (whole_head.weight is whole_embedding.weight):
        raise ModelError(f"{_not_a_part(lm, whole.model)}: only one ties its head to its embedding")
    _refuse_other_logits(lm, whole)


def _refuse_other_logits(lm: PreTrainedModel, whole: Multimodal) -> None:
    """Raise ModelError if the multimodal class does not change the logits of its head as `lm` does, or does not run."""
    backbone = whole.model.get_submodule(whole.modules[lm.base_model_prefix])
    try:
        theirs = measured_transform(whole.model, decoder_layers(cast(PreTrainedModel, backbone)))
    except Exception as error:  # an Unsupported, or an error of transformers
        raise ModelError(f"{_not_a_part(lm, whole.model)}: {first_line(error)}") from error
    if theirs != (ours := logit_transform(lm)):
        raise ModelError(f"{_not_a_part(lm, whole.model)}: it changes its logits by {theirs}, not {ours}")


def _modules(lm: PreTrainedModel, whole: PreTrainedModel) -> dict[str, str]:
    """Return the names of the backbone and of the head of `lm`, each with its name in `whole`.

    Raise ModelError if `whole` has no such backbone, or several.
    """
    kind = type(lm.base_model)
    backbones = [name for name, part in whole.named_modules() if type(part) is kind]
    if len(backbones) != 1:
        raise ModelError(_not_a_part(lm, whole))
    found = {lm.base_model_prefix: backbones[0]}
    if has_head(lm):
        whole_head = whole.get_output_embeddings()
        if not isinstance(whole_head, nn.Linear):
            raise ModelError(_not_a_part(lm, whole))
        found[_name_of(lm.get_output_embeddings(), lm)] = _name_of(whole_head, whole)
    return found


def _name_of(module: nn.Module, model: nn.Module) -> str:
    return next(name for name, part in model.named_modules() if part is module)


def _not_a_part(lm: PreTrainedModel, whole: PreTrainedModel) -> str:
    return (
        f"{lm.name_or_path}: {whole.config.model_type} is not a text-only model, and its class {type(whole).__name__} "
        f"does not run text as {type(lm).__name__} does"
    )


def multimodal_line(lm: PreTrainedModel) -> str | None:
    """Return the line that a run prints about a model within a multimodal checkpoint; None for a text-only model."""
    config = checkpoint_config(lm)
    if config is None:
        return None
    senses = [sense for sense in SENSES if f"{sense}_config" in type(config).sub_configs] or ["other"]
    parts = f"the {' and '.join(senses)} part{'s are' if len(senses) > 1 else ' is'}"
    has_head = lm.get_output_embeddings() is not None
    export = f"{parts} exported unchanged" if has_head else f"{parts} left out, and its export is text-only"
    return f"{config.model_type}: trains the text model; {export}"
