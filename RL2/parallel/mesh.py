"""Who shares what: replicas x FSDP shards x sequence parallelism x tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from RL2.config.model import Trainable, num_shards
from RL2.parallel.processes import Processes


@dataclass(frozen=True)
class Mesh:
    """A model's place on the processes. Those that differ in `sp` and `tp` only work on the same sequences."""

    shards: DeviceMesh
    """Over which FSDP shards each parameter, sequence-parallel processes among them; with replicas, two axes."""
    tp: DeviceMesh | None
    """Over which layers are split."""
    sp: dist.ProcessGroup | None
    """Among which the tokens of a microbatch are split."""
    data: dist.ProcessGroup
    """One process of each part of the data."""
    data_rank: int
    data_size: int
    sp_size: int
    tp_size: int

    @staticmethod
    def make(processes: Processes, model: Trainable, group: str = "actor") -> Mesh:
        """Of the sizes in `model` (collective); neighbours are in one tensor-parallel group.

        `group` is that of the keys. Raises ConfigError if the sizes do not divide the processes.
        """
        device, ddp, sp, tp = processes.device.type, model.ddp_size, model.sp_size, model.tp_size
        shards = num_shards(model, processes.world_size, group)
        # two views of the same ranks: weights are sharded over sequence-parallel processes too, sequences are not
        of_weights = init_device_mesh(device, (ddp, shards * sp, tp), mesh_dim_names=("ddp", "shards", "tp"))
        of_data = init_device_mesh(device, (ddp * shards, sp, tp), mesh_dim_names=("data", "sp", "tp"))
        return Mesh(
            shards=of_weights["ddp", "shards"] if ddp > 1 else of_weights["shards"],
            tp=of_weights["tp"] if tp > 1 else None,
            sp=of_data.get_group("sp") if sp > 1 else None,
            data=of_data.get_group("data"),
            data_rank=of_data.get_local_rank("data"),
            data_size=ddp * shards,
            sp_size=sp,
            tp_size=tp,
        )
