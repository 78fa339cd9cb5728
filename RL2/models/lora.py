"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: the base is frozen, the layer computes W + scale * B @ A.

peft wraps a linear layer NAME: its weight becomes NAME.base_layer.weight, the adapter NAME.lora_A and NAME.lora_B.
It wraps the experts of a layer, which transformers keeps in one module, once for each adapted weight: the wrapped
module computes with W + scale * B @ A in place of W, expert by expert.

Shapes: E experts, O outputs and I inputs of a layer, R rank.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from RL2.config.model import ALL_EXPERTS, ALL_LINEAR, EXPERTS, Lora
from RL2.errors import ConfigError
from RL2.parallel.experts import find_experts
from RL2.parallel.fsdp import whole

ADAPTER = "default"
"""Name of the adapter in peft; there is exactly one."""
BASE = ".base_layer"
NOTE = "_rl2_adapter_config"
"""Attribute of a model with adapters: their configuration in peft."""


def add_adapters(lm: PreTrainedModel, lora: Lora, base_dtype: torch.dtype, model_name: str, group: str) -> None:
    """Wrap the layers named by `lora` in place, on the meta device; afterwards only adapters require gradients.

    The base is converted to `base_dtype`; the adapters are float32. `group` is the prefix of the configuration keys.
    Raise ConfigError if peft is missing or if `target_modules` names a layer that the model lacks.
    """
    try:
        from peft import LoraConfig, TaskType, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"{group}.lora.rank={lora.rank} needs peft: pip install 'rl2-spo[lora]'") from error
    names, weights = _linear_layers(lm, lora.linear, group), _weights_of_experts(lm, lora.experts, group)
    lm.requires_grad_(False)
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(base_dtype)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        target_parameters=weights or None,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=model_name,
    )
    # within another module, because peft reads names of linear layers of a transformers model as those of experts
    around = nn.ModuleDict({"lm": lm})
    inject_adapter_in_model(config, around, ADAPTER, low_cpu_mem_usage=True)
    vars(lm)[NOTE] = config
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def _linear_layers(lm: PreTrainedModel, chosen: tuple[str, ...], group: str) -> list[str]:
    """Return the names of the linear layers that get an adapter.

    Raise ConfigError if `lm` lacks one of them, or might not call it.
    """
    linear = {
        name.rpartition(".")[2] for name, module in lm.base_model.named_modules() if isinstance(module, nn.Linear)
    }
    names = sorted(linear) if chosen == (ALL_LINEAR,) else list(chosen)
    if unknown := set(names) - linear:
        raise ConfigError(
            f"{group}.lora.target_modules has {', '.join(sorted(unknown))}, but the linear layers of "
            f"{type(lm).__name__} are {', '.join(sorted(linear)) or 'of another class than torch.nn.Linear'}"
        )
    refuse_unread(lm, names, group)
    return names


def _weights_of_experts(lm: PreTrainedModel, chosen: tuple[str, ...], group: str) -> list[str]:
    """Return the names of the weights of experts that get an adapter. Raise ConfigError if `lm` lacks one of them."""
    found = {f"{EXPERTS}{name}" for part in find_experts(lm) for name, x in part.named_parameters() if x.ndim == 3}
    unknown = {name for name in chosen if name != ALL_EXPERTS or not found} - found
    if unknown:
        weights = f"the weights of its experts are {', '.join(sorted(found))}"
        raise ConfigError(
            f"{group}.lora.target_modules has {', '.join(sorted(unknown))}, but {type(lm).__name__} has none: "
            f"{weights if found else 'it has no experts that transformers calls through its interface for experts'}"
        )
    return sorted(found) if ALL_EXPERTS in chosen else sorted(chosen)


def refuse_unread(lm: PreTrainedModel, targets: Collection[str], group: str) -> None:
    """Raise ConfigError if a layer named by `targets` is not called: a fused kernel may read its weight instead.

    An adapter on such a layer would be left out without an error.
    """
    for module in {type(part): part for part in lm.base_model.modules()}.values():
        mine = {name for name, child in module.named_children() if isinstance(child, nn.Linear)} & {*targets}
        if mine and (read := {name for name in mine if f"self.{name}.weight" in inspect.getsource(type(module))}):
            raise ConfigError(
                f"{group}.lora.target_modules has {', '.join(sorted(read))}, whose weights {type(module).__name__} "
                "reads without calling the layers, so adapters on them might have no effect; remove them"
            )


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def first_value(name: str, shape: torch.Size) -> Tensor | None:
    """Return the initial value of an adapter's weight as in the paper, A random and B zero; None for other names."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    if ".lora_A." in name:
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
    return None


@contextmanager
def adapters_off(lm: PreTrainedModel) -> Iterator[None]:
    """Disable the adapters within the `with` block: `lm` is then its base."""
    layers: list[Any] = [module for module in lm.modules() if hasattr(module, "lora_A")]
    scales = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] = 0.0  # peft's own switch would also change which parameters require gradients
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[ADAPTER] = scale


def merged_name(name: str) -> str:
    """Return the base model's name of a parameter that may be wrapped, once or twice."""
    return name.replace(BASE, "")


class Adapter(NamedTuple):
    """The adapter of a weight: scale * up @ down is added to it."""

    weight: str
    """Name of the weight in the base model."""
    down_RI: Tensor
    """[E, R, I] for experts."""
    up_OR: Tensor
    """[E, O, R] for experts."""
    scale: float


def adapted_weights(lm: PreTrainedModel) -> dict[str, Any]:
    """Return the layers with adapters, by the name of their weight in the base model."""
    return {
        merged_name(f"{name}.{part.parameter_name if _has_experts(part) else 'weight'}"): part
        for name, part in lm.named_modules()
        if hasattr(part, "lora_A")
    }


def adapters(lm: PreTrainedModel) -> Iterator[Adapter]:
    """Yield the adapters of `lm`, whole (collective)."""
    for name, layer in adapted_weights(lm).items():
        yield Adapter(name, *_factors(layer))


def merge(layer: Any, weight: Tensor) -> Tensor:
    """Return the whole `weight` of a layer of `adapted_weights` with its adapter added in float32 (collective)."""
    down, up, scale = _factors(layer)
    if not _has_experts(layer):
        return weight.float().addmm(up, down, alpha=scale)
    is_transposed = layer.get_base_layer().is_transposed  # experts stored as [E, I, O], not [E, O, I]
    factors = (down.mT, up.mT) if is_transposed else (up, down)
    return weight.float().baddbmm(*factors, alpha=scale)


def _factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """Return the factors of the adapter of a layer, whole, and their scale, as in `Adapter` (collective)."""
    down, up = (whole(x[ADAPTER].weight.detach()) for x in (layer.lora_A, layer.lora_B))
    if _has_experts(layer):  # [E R, I] and [O, R E], in this order of the factors
        down, up = down.unflatten(0, (layer.num_experts, -1)), up.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)
    return down, up, layer.scaling[ADAPTER]


def _has_experts(layer: Any) -> bool:
    """Return whether a wrapped layer is the experts of a layer, not a linear layer."""
    return hasattr(layer, "parameter_name")


def adapter_config(lm: PreTrainedModel, loaded_by: PreTrainedModel, whole_name: Callable[[str], str] | None) -> Any:
    """Return the configuration with which peft loads the adapters of `lm` on the model `loaded_by`.

    `whole_name` maps names in `lm` to names in `loaded_by`, if it has other parts, with layers of the same names.
    """
    config = copy.copy(vars(lm)[NOTE])
    if whole_name is not None:
        layers = adapted_weights(lm)
        config.target_modules = {
            whole_name(name).removesuffix(".weight") for name, layer in layers.items() if not _has_experts(layer)
        }
        config.target_parameters = sorted(whole_name(name) for name, layer in layers.items() if _has_experts(layer))
    misread = {name for name in config.target_modules if _is_misread(name, loaded_by)}
    config.target_modules = set(config.target_modules) - misread
    weights = {*(config.target_parameters or ()), *(f"{name}.weight" for name in misread)}
    config.target_parameters = sorted(weights) or None
    return config


def _is_misread(name: str, lm: PreTrainedModel) -> bool:
    """Return whether peft reads the name of a linear layer as that of experts in transformers 4.

    It does not for a name of a weight.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config: Any = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, lm, None)
    except ValueError:  # it also wants the other names that are one weight of experts now
        return True
    return name not in config.target_modules
