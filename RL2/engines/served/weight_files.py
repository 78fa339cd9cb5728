"""Weights on their way to a server, as safetensors files in a folder that both see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write(weights: Iterator[tuple[str, Tensor]], folder: Path, prefix: str, bucket_bytes: int) -> list[str]:
    """Names of the files in `folder`, each begins with `prefix`.

    A file holds at most `bucket_bytes`, or one tensor that is larger.

    A file is written as soon as it is full, so beside the files themselves no more than one bucket is in memory.
    """
    files: list[str] = []
    bucket: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        nonlocal size
        files.append(f"{prefix}{len(files):05d}.safetensors")
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
