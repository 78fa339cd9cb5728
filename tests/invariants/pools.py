"""Pools of real processes (gloo), and what their results are compared by."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import warm
from torch import Tensor

from RL2.config.load import load
from RL2.engines.served.server import free_port
from RL2.parallel import fsdp
from RL2.parallel.processes import Processes

Result = dict[str, Any]


@functools.cache
def loaded(program: str, overrides: str) -> Any:
    """Return the configuration of a program; tests read the same one many times."""
    return load(program, overrides.split())


def in_pool(run: Callable[[Path, Processes], Any], folder: Path, size: int) -> list[Any]:
    """What `run(folder, processes)`, a function at the top of a module, gives on each of `size` new processes."""
    port = free_port()
    warm.start_server()
    mp.start_processes(_member, args=(run, folder, size, port), nprocs=size, start_method="forkserver")
    return [torch.load(folder / f"results_{size}_{rank}.pt", weights_only=True) for rank in range(size)]


def _member(rank: int, run: Callable[[Path, Processes], Any], folder: Path, size: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    processes = Processes.start(timeout_s=60)
    torch.save(run(folder, processes), folder / f"results_{size}_{rank}.pt")
    processes.stop()


def whole(x: Tensor) -> Tensor:
    """A copy, put together if it is sharded (collective)."""
    return fsdp.whole(x).clone()


def assert_same(ours: Result, theirs: Result, tolerance: float) -> None:
    """Each tensor to `tolerance` of its norm, each metric relatively; what is nearly zero, to 1e-8."""
    assert ours["grads"].keys() == theirs["grads"].keys()
    for name, x in ours["grads"].items():
        y = theirs["grads"][name]
        assert (x - y).norm() <= tolerance * y.norm() + 1e-8, name
    for name, value in ours["metrics"].items():
        assert theirs["metrics"][name] == pytest.approx(value, rel=10 * tolerance, abs=tolerance), name
