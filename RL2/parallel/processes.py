"""Processes of a run: one process group, whether there is one process or many."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from RL2.errors import ConfigError, LostProcess, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all of a run, and the collectives that training needs. Every wait has a time limit.

    Each wait names what it waits for; if another process does not arrive, `LostProcess` reports that name.
    """

    rank: int
    world_size: int
    device: torch.device
    timeout_s: float
    """Limit of each wait, in seconds."""

    @staticmethod
    def start(timeout_s: float) -> Processes:
        """Join the group that torchrun describes, or create one of a single process: NCCL on GPUs, gloo on CPUs."""
        cuda = torch.cuda.is_available()
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            if local_rank >= torch.cuda.device_count():
                raise ConfigError(
                    f"{os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)} processes on a machine with "
                    f"{torch.cuda.device_count()} GPU(s), and each takes one; lower --nproc (--nproc_per_node)"
                )
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        timeout = timedelta(seconds=timeout_s)
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        nodes, restarts = (int(os.environ.get(name, 0)) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
        if is_shared and nodes > 1 and restarts:
            raise ConfigError(
                "torchrun --max-restarts on several nodes needs a separate store for each start, or they may not "
                "meet again: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on each"
            )
        processes = Processes(rank, world_size, device, timeout_s)
        with processes.expecting("all processes to join"):
            store: dist.Store = dist.HashStore()
            if "RANK" in os.environ:
                store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
                if is_shared:
                    # torchrun reuses its store after a restart, with the addresses of dead processes in it
                    store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        return processes

    @staticmethod
    def alone(device: torch.device) -> Processes:
        """Return a single process that joins no group, as in a notebook."""
        return Processes(rank=0, world_size=1, device=device, timeout_s=math.inf)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_here(self) -> bool:
        """True if this is the first process of its machine."""
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    @contextmanager
    def expecting(self, what: str) -> Iterator[None]:
        """Convert a communication error in the `with` block to `LostProcess`, which reports `what` was waited for."""
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, UserError) or not (isinstance(error, dist.DistError) or _of_gloo(error)):
                raise
            raise self.lost(what) from error

    def lost(self, what: str) -> LostProcess:
        return LostProcess(
            f"failed while waiting for {what}: another of the {self.world_size} processes died or did not arrive "
            f"within trainer.timeout_s={self.timeout_s:g}"
        )

    def sum(self, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Sum `x` in place over all processes, or those of `group`, and return it."""
        if self.world_size > 1:
            with self.expecting("a sum over all processes"):
                dist.all_reduce(x, dist.ReduceOp.SUM, group=group)
        return x

    def max(self, x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        if self.world_size > 1:
            with self.expecting("a maximum of all"):
                dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
        return x

    def gather(self, items: list[Any], what: str = "what all processes have") -> list[Any]:
        """Return the lists of all processes joined in rank order, on each process. Items are pickled."""
        if self.world_size == 1:
            return items
        parts: list[list[Any]] = [[] for _ in range(self.world_size)]
        with self.expecting(what):
            dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def of_first(self, work: Callable[[], T], what: str) -> T:
        """Run `work` on the first process and return its result, or raise its UserError, on each (collective)."""
        outcome: list[T | UserError] = []
        if self.is_first:
            try:
                outcome = [work()]
            except UserError as error:
                outcome = [error]
        (found,) = self.gather(outcome, what)
        if isinstance(found, UserError):
            raise found
        return found

    def wait(self, what: str = "all processes to come to the same point") -> None:
        """Wait until all processes have arrived."""
        with self.expecting(what):
            dist.barrier()

    def stop(self) -> None:
        dist.destroy_process_group()


def _of_gloo(error: RuntimeError) -> bool:
    """Return whether gloo raised the error: it raises plain RuntimeErrors that name its source files."""
    text = str(error)
    return "gloo" in text or "Connection closed by peer" in text or "Timed out waiting" in text
