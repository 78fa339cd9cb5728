"""Counter of the bytes that collectives send."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "all-gather": ("_allgather_base_", "allgather_", "allgather_into_tensor_coalesced_", "all_gather_into_tensor"),
    "reduce-scatter": ("_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "reduce_scatter_tensor"),
    "all-reduce": ("allreduce_", "allreduce_coalesced_", "all_reduce", "all_reduce_"),
    "all-to-all": ("alltoall_base_", "all_to_all_single"),
}
KIND = {name: kind for kind, names in KINDS.items() for name in names}
"""Name of an operation of torch -> kind of collective."""
LOCAL = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")
"""Other operations, which send negligible amounts."""


class Traffic(TorchDispatchMode):
    """Mode that counts bytes sent by this process, and calls, by (collective, number of processes).

    Bytes are those of a ring: of S bytes gathered or reduced over n processes each sends S (n - 1) / n; an all-reduce
    does both; an all-to-all sends the parts of other processes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[tuple[str, int], float] = defaultdict(float)
        self.calls: dict[tuple[str, int], int] = defaultdict(int)

    def by_collective(self) -> dict[str, float]:
        """Return bytes by collective."""
        total: dict[str, float] = defaultdict(float)
        for (collective, _), size in self.sent.items():
            total[collective] += size
        return dict(total)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it is dispatched again, as operations on local tensors
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name not in LOCAL:
            if name not in KIND:
                raise NotImplementedError(f"no way to count what {func} sends")
            size = next(filter(None, map(_group_size, args)))
            whole = max(sum(x.nbytes for x in _tensors(arg)) for arg in (*args, out))
            key = KIND[name], size
            self.sent[key] += whole * (size - 1) / size * (2 if KIND[name] == "all-reduce" else 1)
            self.calls[key] += 1
        return out


def _group_size(arg: Any) -> int:
    if isinstance(arg, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(arg).size()
        except RuntimeError:
            return 0
    if isinstance(arg, str) and arg not in ("sum", "max"):
        return torch.distributed.distributed_c10d._resolve_process_group(arg).size()  # type: ignore[arg-type]
    return 0


def _tensors(arg: Any) -> list[Tensor]:
    if isinstance(arg, Tensor):
        return [arg]
    if isinstance(arg, (list, tuple)):
        return [x for part in arg for x in _tensors(part)]
    return []
