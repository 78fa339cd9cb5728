"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: the base is frozen, the layer computes W + scale * B @ A.

peft wraps a linear layer NAME: its weight becomes NAME.base_layer.weight, the adapter NAME.lora_A and NAME.lora_B.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from RL2.config.model import ALL_LINEAR, Lora
from RL2.errors import ConfigError
from RL2.parallel.fsdp import whole

ADAPTER = "default"
"""Name of the adapter in peft; there is exactly one."""
BASE = ".base_layer"


def add_adapters(lm: PreTrainedModel, lora: Lora, base_dtype: torch.dtype, model_name: str, group: str) -> None:
    """Wrap the layers named by `lora` in place, on the meta device; afterwards only adapters require gradients.

    The base is converted to `base_dtype`; the adapters are float32. `group` is the prefix of the configuration keys.
    Raise ConfigError if peft is missing or if `target_modules` names no linear layer of the model.
    """
    try:
        from peft import LoraConfig, TaskType, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"{group}.lora.rank={lora.rank} needs peft: pip install 'rl2-spo[lora]'") from error
    linear = {
        name.rpartition(".")[2] for name, module in lm.base_model.named_modules() if isinstance(module, nn.Linear)
    }
    names = sorted(linear) if lora.target_modules == (ALL_LINEAR,) else list(lora.target_modules)
    if unknown := set(names) - linear:
        raise ConfigError(
            f"{group}.lora.target_modules has {', '.join(sorted(unknown))}, but the linear layers of "
            f"{type(lm).__name__} are {', '.join(sorted(linear)) or 'of another class than torch.nn.Linear'}"
        )
    refuse_unread(lm, names, group)
    lm.requires_grad_(False)
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(base_dtype)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=model_name,
    )
    inject_adapter_in_model(config, lm, ADAPTER, low_cpu_mem_usage=True)
    for name, parameter in lm.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


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
    """Return the base model's name of a parameter that may be wrapped."""
    return name.replace(f"{BASE}.", ".")


class Adapter(NamedTuple):
    """The adapter of a linear layer of O outputs and I inputs: scale * up @ down is added to its weight."""

    weight: str
    """Name of the weight in the base model."""
    down_RI: Tensor
    up_OR: Tensor
    scale: float


def adapted_weights(lm: PreTrainedModel) -> dict[str, Any]:
    """Return the layers with adapters, by the name of their weight in the base model."""
    return {f"{name}.weight": part for name, part in lm.named_modules() if hasattr(part, "lora_A")}


def adapters(lm: PreTrainedModel) -> Iterator[Adapter]:
    """Yield the adapters of `lm`, whole (collective)."""
    for name, layer in adapted_weights(lm).items():
        yield _adapter(name, layer)


def merge(lm: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """Return the whole parameter `weight` with its adapter, if any, added in float32 (collective)."""
    layer_name, wrapped, kind = name.rpartition(f"{BASE}.")
    if not wrapped or kind != "weight":
        return weight
    adapter = _adapter(merged_name(name), lm.get_submodule(layer_name))
    return weight.float().addmm(adapter.up_OR, adapter.down_RI, alpha=adapter.scale)


def _adapter(weight_name: str, layer: Any) -> Adapter:
    down, up = (whole(x[ADAPTER].weight.detach()) for x in (layer.lora_A, layer.lora_B))
    return Adapter(weight_name, down, up, layer.scaling[ADAPTER])
