"""CUDA graphs of a decoding step: one launch in place of a thousand.

For a small model, launching kernels from Python takes longer than running them. A graph is recorded once per input
shape and stays valid as long as weights and cache keep their addresses.
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
    """Recorded graphs of one function, by the shape of its input."""

    def __init__(self) -> None:
        self.recorded: dict[tuple[int, ...], _Recorded | None] = {}
        """Graphs by shape; None for a shape seen once."""
        self.pool = torch.cuda.graph_pool_handle()
        self.can_record = True

    def __call__(self, run: Run, inputs: np.ndarray, device: torch.device) -> Tensor:
        """Return `run(inputs)`; the next call overwrites the result.

        The first pass of a shape is not recorded: the shape may not recur, and that pass loads the kernels.
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
            # other threads, such as NCCL's watchdog, may use the GPU meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = run(inputs)
        except RuntimeError as error:
            self.can_record = False
            logger.warning(
                "decoding without CUDA graphs: this model cannot be recorded (%s)", str(error).split("\n")[0]
            )
            return None
        return _Recorded(graph, inputs, outputs)
