"""Sharding of a model over processes (FSDP2), with gradients that are summed and float32 master weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(module: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shard float32 `module` in place, layer by layer. Compute runs in `compute_dtype`, reduction in float32."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # the weights in the loss already divide by the global count
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # otherwise a factor is an operation that gloo does not have
