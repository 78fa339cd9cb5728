"""Sharding of a model over processes (FSDP2), with summed gradients and float32 master weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard


def shard(
    module: nn.Module,
    layers: nn.ModuleList,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    experts: Sequence[nn.Module] = (),
    expert_shards: DeviceMesh | None = None,
) -> None:
    """Shard the float32 `module` in place, layer by layer. Compute is in `compute_dtype`, reduction in float32.

    `experts` are modules in the layers that expert parallelism has split; FSDP shards them over `expert_shards`.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in experts:
        assert expert_shards is not None
        fully_shard(part, mesh=expert_shards, mp_policy=policy, shard_placement_fn=_beside_experts(expert_shards))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # the weights in the loss already divide by the global count
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # otherwise a factor becomes an operation that gloo lacks


def _beside_experts(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard]:
    """Return the dimension along which a parameter of experts is sharded over the last axis of `mesh`.

    The first dimension is split by expert parallelism already, and a process may have fewer experts than there are
    shards. Only there FSDP allows shards of different sizes.
    """
    size = mesh.size(-1)
    return lambda parameter: Shard(0 if parameter.shape[1] % size else 1)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return the parameters in groups with the same mesh: one operation cannot mix meshes."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return list(groups.values())


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to a total norm of at most `max_norm` and return the norm before scaling (collective)."""
    moved = by_mesh(p for p in parameters if p.grad is not None)
    norms = [_total_norm([p.grad for p in group if p.grad is not None]) for group in moved]
    if not norms:
        return 0.0
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in moved:
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        torch._foreach_mul_([local(p.grad) for p in group if p.grad is not None], scale)
    return float(total)


def _total_norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        for dim in range(norm.device_mesh.ndim):  # DTensor warns when it sums over several dimensions at once
            norm = norm.redistribute(placements=[Replicate() if i <= dim else p for i, p in enumerate(norm.placements)])
    return whole(norm)


def local(x: Tensor) -> Tensor:
    """Return this process's part of `x`."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Return all of `x`, gathered if it is sharded (collective)."""
    return x.full_tensor() if isinstance(x, DTensor) else x
