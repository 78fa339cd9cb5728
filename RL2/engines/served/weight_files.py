"""Weights on their way to a server, as safetensors files in a folder that both see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    for name, weight in weights:
        if bucket and size + weight.nbytes > bucket_bytes:
            files.append(write_bucket(bucket, folder, prefix, len(files)))
            bucket, size = {}, 0
        # a copy: the next tensor may be gathered into the same memory
        bucket[name] = weight.detach().to("cpu", copy=True).contiguous()
        size += weight.nbytes
    if bucket:
        files.append(write_bucket(bucket, folder, prefix, len(files)))
    return files


def write_bucket(bucket: Mapping[str, Tensor], folder: Path, prefix: str, number: int) -> str:
    """The name of the file."""
    name = f"{prefix}{number:05d}.safetensors"
    save_file(dict(bucket), folder / name)
    return name
