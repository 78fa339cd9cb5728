"""Device mesh of a model: replicas x FSDP shards x sequence parallelism x tensor parallelism.

With expert parallelism the FSDP shards are groups of `ep_size` processes, each with different experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from RL2.config.model import Trainable, num_shards
from RL2.parallel.processes import Processes


@dataclass(frozen=True)
class Mesh:
    """Position of a model on the processes. Processes that differ only in `sp` and `tp` share the same sequences."""

    shards: DeviceMesh
    """Mesh over which FSDP shards each parameter, including sequence-parallel processes; two axes with replicas."""
    tp: DeviceMesh | None
    """Mesh over which layers are split; None without tensor parallelism."""
    ep: DeviceMesh | None
    """Mesh over which the experts of each layer are split; None without expert parallelism."""
    expert_shards: DeviceMesh | None
    """Mesh over which FSDP shards the experts of a process; two axes with replicas; None without expert parallelism."""
    sp: dist.ProcessGroup | None
    """Group over which the tokens of a microbatch are split; None without sequence parallelism."""
    data: dist.ProcessGroup
    """Group with one process from each part of the data."""
    data_rank: int
    data_size: int
    sp_size: int
    tp_size: int
    ep_size: int

    @staticmethod
    def make(processes: Processes, model: Trainable, group: str = "actor") -> Mesh:
        """Create the mesh with the sizes in `model` (collective); neighbours share a tensor- or expert-parallel group.

        `group` is the prefix of the configuration keys. Raise ConfigError if the sizes do not divide the number of
        processes.
        """
        device, ddp, sp, tp, ep = processes.device.type, model.ddp_size, model.sp_size, model.tp_size, model.ep_size
        shards = num_shards(model, processes.world_size, group)
        # two views of the same ranks: sequence-parallel processes shard weights too, but share sequences
        of_weights = init_device_mesh(device, (ddp, shards * sp, tp), mesh_dim_names=("ddp", "shards", "tp"))
        of_data = init_device_mesh(device, (ddp * shards, sp, tp), mesh_dim_names=("data", "sp", "tp"))
        of_experts = None
        if ep > 1:  # a third view, with the experts' own FSDP shards; sp and tp are 1
            names = ("ddp", "expert_shards", "ep")
            of_experts = init_device_mesh(device, (ddp, shards // ep, ep), mesh_dim_names=names)
            of_experts["expert_shards", "ep"]._flatten("experts")  # for DTensor, which sums norms over both at once
        return Mesh(
            shards=_shards(of_weights, "shards"),
            tp=of_weights["tp"] if tp > 1 else None,
            ep=None if of_experts is None else of_experts["ep"],
            expert_shards=None if of_experts is None else _shards(of_experts, "expert_shards"),
            sp=of_data.get_group("sp") if sp > 1 else None,
            data=of_data.get_group("data"),
            data_rank=of_data.get_local_rank("data"),
            data_size=ddp * shards,
            sp_size=sp,
            tp_size=tp,
            ep_size=ep,
        )


def _shards(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    """Return the axis of `mesh` over which FSDP shards, after that of the replicas if there are any."""
    return mesh["ddp", axis] if mesh["ddp"].size() > 1 else mesh[axis]


def layout_group(group: str) -> str:
    """Return the group of keys with the sizes of the mesh of `group`; references and teachers have the actor's."""
    return "actor" if group.startswith(("ref_actor", "teacher")) else group
