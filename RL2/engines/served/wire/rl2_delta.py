"""Changes of weights as bytes, without loss, and checksums of weights. Trainer and server both import this file.

A change of a weight is two tensors: the distances between the elements that changed, and their new values. At small
learning rates 1 to 3 % of bfloat16 weights change in a step, which takes about three bytes for each. The server's
environment has no RL2, so this file imports only torch, and its directory is on the server's PYTHONPATH.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

GAPS, VALUES = ".rl2_gaps", ".rl2_values"
"""Endings of the names of the two tensors of a change, after the name of its weight."""
ESCAPE = 255
"""A byte of this value adds to the distance in the next byte."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> type that compares its bits, so that -0 and NaN are kept too."""


def change(name: str, old: Tensor, new: Tensor) -> dict[str, Tensor]:
    """Return the tensors that turn `old` into `new`, by name: the smaller of a change and `new` itself.

    Return nothing if they are equal bit for bit. Both have the same dtype and shape, and are on the CPU.
    """
    bits = BITS[new.element_size()]
    flat = new.contiguous().view(-1)
    places = (old.contiguous().view(-1).view(bits) != flat.view(bits)).nonzero()[:, 0]
    if not len(places):
        return {}
    found = {f"{name}{GAPS}": _gaps(places), f"{name}{VALUES}": flat[places]}
    return found if sum(x.nbytes for x in found.values()) < new.nbytes else {name: new}


def apply(weights: dict[str, Tensor], received: Iterable[tuple[str, Tensor]]) -> None:
    """Apply whole tensors and changes, in any order, to `weights`, in place.

    Raise ValueError if a change does not fit.
    """
    halves: dict[str, Tensor] = {}
    for name, tensor in received:
        if name.endswith((GAPS, VALUES)):
            halves[name] = tensor
            weight_name = name.removesuffix(GAPS).removesuffix(VALUES)
            if f"{weight_name}{GAPS}" in halves and f"{weight_name}{VALUES}" in halves:
                gaps, values = halves.pop(f"{weight_name}{GAPS}"), halves.pop(f"{weight_name}{VALUES}")
                _put(weights, weight_name, _places(gaps), values)
        else:
            weights[name] = tensor.clone(memory_format=torch.contiguous_format)
    if halves:
        raise ValueError(f"only one part of changes came: {', '.join(sorted(halves))}")


def _put(weights: dict[str, Tensor], name: str, places: Tensor, values: Tensor) -> None:
    if name not in weights:
        raise ValueError(f"a change of {name}, which never came whole")
    flat = weights[name].view(-1)
    if len(places) != len(values) or values.dtype != flat.dtype or int(places.max()) >= len(flat):
        raise ValueError(f"a change of {name} does not fit it")
    flat[places] = values


def checksums(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the CRC-32 of the bytes of each weight, with its dtype and shape."""
    with ThreadPoolExecutor(min(16, torch.get_num_threads())) as threads:
        return dict(zip(weights, threads.map(_checksum, weights.values()), strict=True))


def differences(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Iterator[str]:
    """Yield the names of weights whose checksums differ, or that only one side has."""
    yield from (name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name))


def _checksum(weight: Tensor) -> int:
    start = zlib.crc32(f"{weight.dtype} {list(weight.shape)}".encode())
    return zlib.crc32(weight.contiguous().view(-1).view(torch.uint8).numpy().data, start)


def _gaps(places: Tensor) -> Tensor:
    """Return rising `places` as distances, uint8: each is some bytes of `ESCAPE`, and the rest in a last one."""
    gap = places.diff(prepend=places.new_zeros(1))
    last = (gap // ESCAPE + 1).cumsum(0) - 1
    found = torch.full((int(last[-1]) + 1,), ESCAPE, dtype=torch.uint8)
    found[last] = (gap % ESCAPE).to(torch.uint8)
    return found


def _places(gaps: Tensor) -> Tensor:
    """Return the places of `_gaps`, int64."""
    return gaps.cumsum(0, dtype=torch.int64)[gaps != ESCAPE]
