"""CUDA graphs of a decoding step: the processor says one thing to the GPU instead of a thousand.

A layer of a small model keeps the GPU busy for less time than Python takes to launch its kernels. A graph is recorded
once for each shape of the input and holds as long as the weights and the cache stay where they are in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Run = Callable[[Tensor], Tensor]


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    outputs: Tensor


class Graphs:
    def __init__(self) -> None:
        self.recorded: dict[tuple[int, ...], _Recorded | None] = {}
        """By shape; None: seen once."""
        self.pool = torch.cuda.graph_pool_handle()
        self.can_record = True

    def __call__(self, run: Run, inputs: np.ndarray, device: torch.device) -> Tensor:
        """`run(inputs)`; the result is overwritten by the next call.

        A shape that comes for the first time is not recorded: it may not come again, and its pass prepares all kernels.
        """
        shape = inputs.shape
        on_host = torch.from_numpy(inputs).pin_memory()
        recorded = self.recorded.get(shape)
        if recorded is None and shape in self.recorded and self.can_record:
            recorded = self.recorded[shape] = self._record(run, on_host.to(device))
        self.recorded.setdefault(shape, None)
        if recorded is None:
            return run(on_host.to(device, non_blocking=True))
        recorded.inputs.copy_(on_host, non_blocking=True)
        recorded.graph.replay()
        return recorded.outputs

    def _record(self, run: Run, inputs: Tensor) -> _Recorded | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads may use the GPU meanwhile, NCCL's watchdog for one
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = run(inputs)
        except RuntimeError as error:
            self.can_record = False
            logger.warning(
                "decoding without CUDA graphs: this model cannot be recorded (%s)", str(error).split("\n")[0]
            )
            return None
        return _Recorded(graph, inputs, outputs)
