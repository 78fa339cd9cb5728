"""Base weights and adapters of a policy apart, so that only adapters are sent after the first time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from RL2.engines.served.wire.rl2_wire import adapter_tensors
from RL2.errors import ConfigError
from RL2.models.conversion import StoredLayout, weight_shapes
from RL2.models.lora import Adapter, adapted_weights


class AdaptedPolicy(Protocol):
    """The part of the actor that is needed here."""

    @property
    def lm(self) -> PreTrainedModel: ...

    def base_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight without its adapter, whole (collective)."""
        ...

    def adapters(self) -> Iterator[Adapter]:
        """Yield the adapters, whole (collective)."""
        ...


@dataclass(frozen=True)
class Apart:
    """The weights of a policy under the names of its checkpoint."""

    policy: AdaptedPolicy
    layout: StoredLayout
    names: Mapping[str, str]
    """Name of an adapted weight in the model -> its name in the checkpoint."""

    def base(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight, without its adapter (collective)."""
        for name, weight in self.policy.base_weights():
            yield from self.layout(name, weight).items()

    def adapters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the adapters (collective)."""
        for name, down, up, scale in self.policy.adapters():
            yield from adapter_tensors(self.names[name], down, up, scale).items()


def apart(policy: AdaptedPolicy, layout: StoredLayout) -> Apart:
    """Return the weights of `policy` apart.

    Raise ConfigError if an adapted weight is not one tensor of a checkpoint.
    """
    shapes, names = weight_shapes(policy.lm), dict[str, str]()
    for name in adapted_weights(policy.lm):
        stored = layout(name, shapes[name])
        if [x.shape for x in stored.values()] != [shapes[name].shape]:
            raise ConfigError(
                f"rollout.vllm.lora=adapter: a checkpoint of {policy.lm.config.model_type} does not store {name} as "
                "one tensor; use rollout.vllm.lora=merged"
            )
        names[name] = next(iter(stored))
    return Apart(policy, layout, names)
