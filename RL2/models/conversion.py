"""Checkpoints in another layout than the model: experts stored one by one, former names. The layouts are transformers'.

A renaming maps one stored name to one parameter. A conversion computes parameters from several stored tensors, such as
the fused experts of a layer from the weights of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from RL2.models.inspection import stored_buffers
from RL2.models.lora import is_adapter, merged_name


@dataclass
class Conversion:
    """Stored tensors from which one or several parameters are computed."""

    name: str
    """First parameter that it computes."""
    rule: WeightConverter
    sources: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of a pattern of the rule and the stored name that matches it, in the order of the result."""

    def __call__(self, lm: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the parameters by name; `read` returns a stored tensor."""
        rule = copy.deepcopy(self.rule)
        for pattern, stored_name in self.sources:
            rule.add_tensor(self.name, stored_name, pattern, read(stored_name))  # type: ignore[arg-type]
        computed: dict[str, Any] = rule.convert(self.name, model=lm, config=lm.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in computed.items()}


def conversions(
    lm: PreTrainedModel, names: Collection[str], stored_names: Collection[str]
) -> tuple[dict[str, str], list[Conversion]]:
    """Return stored name -> name of its parameter, and the conversions, by transformers' rules for the class of `lm`.

    `names` are those of the parameters and buffers of `lm`. Stored names that no rule maps to one of them are left out.
    """
    rules = get_model_conversion_mapping(lm)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    renamed: dict[str, str] = {}
    found: dict[str, Conversion] = {}
    known = dict.fromkeys(names, True)
    for stored_name in sorted(stored_names, key=dot_natural_key):
        name, pattern = rename_source_key(stored_name, renamings, converters, lm.base_model_prefix, known)
        if name in known and pattern is None:
            renamed[stored_name] = name
        elif name in known and pattern is not None:
            found.setdefault(name, Conversion(name, of_pattern[pattern])).sources.append((pattern, stored_name))
    return renamed, list(found.values())


def weight_shapes(lm: PreTrainedModel) -> dict[str, Tensor]:
    """Return all parameters and stored buffers of `lm` on the meta device, with adapters merged into parameters."""
    return {
        merged_name(name): torch.empty(p.shape, dtype=torch.float32, device="meta")
        for name, p in lm.named_parameters()
        if not is_adapter(name)
    } | {name: buffer.to("meta") for name, buffer in stored_buffers(lm).items()}


StoredLayout = Callable[[str, Tensor], dict[str, Tensor]]
"""Function from the name and value of a parameter to the tensors of a checkpoint that are computed from it."""


def stored_layout(lm: PreTrainedModel) -> StoredLayout | None:
    """Return the layout of a checkpoint of `lm`; None if it computes a tensor from several parameters.

    Transformers then loads the parameters under their own names too.
    """
    shapes = weight_shapes(lm)

    def alone(name: str, value: Tensor) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = revert_weight_conversion(lm, {name: value})
        return stored

    try:
        together = revert_weight_conversion(lm, dict(shapes))
        apart = {name: x for pair in shapes.items() for name, x in alone(*pair).items()}
    except (RuntimeError, ValueError, KeyError, AttributeError):  # a rule that needs several parameters, or values
        return None
    same = {name: x.shape for name, x in together.items()} == {name: x.shape for name, x in apart.items()}
    return alone if same else None


def own_name(name: str, value: Tensor) -> dict[str, Tensor]:
    """Return the parameter itself: the layout of a checkpoint that stores each under its own name."""
    return {name: value}
