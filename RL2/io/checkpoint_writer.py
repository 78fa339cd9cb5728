"""Writer for torch's distributed checkpoints that also computes the digest of each file it writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from RL2.io import digests


@dataclass(frozen=True)
class Written:
    """Digests of the files that one process wrote; sent to the first process with torch's own results."""

    digests: dict[str, str]


class Writer(dcp.FileSystemWriter):
    """A `torch.distributed.checkpoint.FileSystemWriter` that collects the digests of all files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.digests: dict[str, str] = {}
        """File name -> SHA-256 for the files of all processes; complete on the first process after `finish`."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[Any] = super().write_data(plan, planner).wait()
        names = {result.storage_data.relative_path for result in results}
        results.append(Written(digests.compute(Path(self.path), names)))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        for result in (result for part in results for result in part if isinstance(result, Written)):
            self.digests |= result.digests
        super().finish(metadata, [[r for r in part if not isinstance(r, Written)] for part in results])
        self.digests |= digests.compute(Path(self.path), [".metadata"])
