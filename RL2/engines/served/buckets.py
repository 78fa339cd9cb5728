"""Pack weights into buckets of bounded size, for memory and for files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from RL2.engines.served.wire.rl2_wire import Entry, aligned, entry, tensors

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bucket:
    """Several weights in one flat tensor."""

    flat: Tensor
    """[bytes] uint8. The next bucket reuses its memory."""
    entries: list[Entry]
    """The weights in `flat`, in order."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name, as views of `flat`."""
        return dict(tensors(self.flat, self.entries))


def in_buckets(weights: Iterator[tuple[str, Tensor]], bucket_bytes: int, device: torch.device) -> Iterator[Bucket]:
    """Copy `weights` to `device` in buckets of at most `bucket_bytes`; a larger weight gets a bucket of its own.

    All other buckets share one buffer, so that only one bucket is in memory.
    """
    buffer: Tensor | None = None
    entries: list[Entry] = []
    size = 0
    for name, weight in weights:
        needed = aligned(weight.nbytes)
        if entries and size + needed > bucket_bytes:
            assert buffer is not None
            yield Bucket(buffer[:size], entries)
            entries, size = [], 0
        if needed > bucket_bytes:
            own = torch.empty(needed, dtype=torch.uint8, device=device)
            yield Bucket(_put(weight, name, own), [entry(name, weight)])
            continue
        if buffer is None:
            buffer = torch.empty(bucket_bytes, dtype=torch.uint8, device=device)
        _put(weight, name, buffer[size : size + needed])
        entries, size = [*entries, entry(name, weight)], size + needed
    if entries:
        assert buffer is not None
        yield Bucket(buffer[:size], entries)


def _put(weight: Tensor, name: str, place: Tensor) -> Tensor:
    ((_, view),) = tensors(place, [entry(name, weight)])
    view.copy_(weight.detach())
    return place


def write(weights: Iterator[tuple[str, Tensor]], folder: Path, prefix: str, bucket_bytes: int) -> list[str]:
    """Write `weights` as safetensors files, one per bucket; return their names in `folder`."""
    buckets = in_buckets(weights, bucket_bytes, CPU)
    return [write_bucket(bucket, folder, prefix, number) for number, bucket in enumerate(buckets)]


def write_bucket(bucket: Bucket, folder: Path, prefix: str, number: int) -> str:
    """Write one bucket as a safetensors file; return its name in `folder`."""
    name = f"{prefix}{number:05d}.safetensors"
    save_file(Bucket(bucket.flat.cpu(), bucket.entries).tensors(), folder / name)
    return name
