"""The processes of a run: one process group and one device mesh, whether there is one process or many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among all, and the collectives that training needs. Every wait ends after a time limit."""

    rank: int
    world_size: int
    device: torch.device

    @staticmethod
    def start(timeout_s: float) -> Processes:
        """Join the group that torchrun describes, or make one of a single process. NCCL on GPUs, gloo on CPUs."""
        cuda = torch.cuda.is_available()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return Processes(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Sum over all processes, or those of `group`; the same on each."""
        dist.all_reduce(x, dist.ReduceOp.SUM, group=group)
        return x

    def max(self, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
        return x

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, joined in rank order, on each. Objects of our own processes only."""
        if self.world_size == 1:
            return items
        parts: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def wait(self) -> None:
        """Until all processes have come here."""
        dist.barrier()

    def stop(self) -> None:
        dist.destroy_process_group()
