"""Weights on their way to a server, as safetensors files in a folder that both see."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARED_MEMORY = Path("/dev/shm")


def make_folder(parent: str | None) -> Path:
    """A folder of this process in `parent`, by default in shared memory, where those of dead processes are removed."""
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="rl2-weights-", dir=parent))
    root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    prefix = f"rl2-weights-{os.getuid()}-"
    for old in root.glob(f"{prefix}*"):
        if not _is_alive(int(old.name.split("-")[3])):
            shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=root))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def write(weights: Iterator[tuple[str, Tensor]], folder: Path, prefix: str, bucket_bytes: int) -> list[str]:
    """Names of the files in `folder`; each holds at most `bucket_bytes`, or one tensor that is larger.

    A file is written as soon as it is full, so beside the files themselves no more than one bucket is in memory.
    """
    files: list[str] = []
    bucket: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        files.append(f"{prefix}-{len(files):05d}.safetensors")
        save_file(bucket, folder / files[-1])
        bucket.clear()
        size = 0

    for name, weight in weights:
        if bucket and size + weight.nbytes > bucket_bytes:
            flush()
        # a copy: the next tensor may be gathered into the same memory
        bucket[name] = weight.detach().to("cpu", copy=True).contiguous()
        size += weight.nbytes
    if bucket:
        flush()
    return files
