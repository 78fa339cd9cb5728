"""Rows of a cache of transformers, of any kind: select and repeat them, and join two caches.

A cache is a nest of objects of transformers, lists and dicts with tensors: keys, values, states of convolutions and
recurrences. transformers' own methods cover only some of them. Functions here work on all tensors whose first
dimension is the rows, and leave the others, such as the size of a window, as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

Nest = Any
"""A cache, or a part of one."""


class CannotJoin(Exception):
    """Two caches that differ in more than their rows."""


class UnusableCache(Exception):
    """A reason not to use a model's cache."""


def select(cache: Nest, rows: int, index: Tensor) -> Nest:
    """Return a cache with the rows `index`, which may repeat, of one with `rows` rows."""
    return _mapped(lambda x: x.index_select(0, index) if _has_rows(x, rows) else x, cache)


def join(one: Nest, rows: int, other: Nest, other_rows: int) -> Nest:
    """Return a cache with the rows of both. Raise CannotJoin if they differ in structure, length or any setting."""

    def both(x: Tensor, y: Tensor) -> Tensor:
        if _has_rows(x, rows) and _has_rows(y, other_rows) and (x.shape[1:], x.dtype) == (y.shape[1:], y.dtype):
            return torch.cat([x, y])
        if x.shape != y.shape or not torch.equal(x, y):
            raise CannotJoin
        return x

    return _mapped(both, one, other)


def bytes_per_row(cache: Nest, rows: int) -> float:
    """Return the size of a row. Raise UnusableCache if the first dimension of a tensor is not the rows."""
    total = 0
    for tensor in _tensors(cache):
        if tensor.dim() and tensor.numel() and len(tensor) != rows:
            raise UnusableCache(f"it has a tensor of shape {list(tensor.shape)} for {rows} sequences")
        total += tensor.nbytes
    return total / rows


def _has_rows(tensor: Tensor, rows: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == rows


def _tensors(cache: Nest) -> Iterator[Tensor]:
    found: list[Tensor] = []
    _mapped(lambda x: found.append(x) or x, cache)  # type: ignore[func-returns-value]
    yield from found


def _mapped(change: Callable[..., Tensor], first: Nest, *others: Nest) -> Nest:
    """Return a copy of `first` in which each tensor is `change(tensor, *tensors at the same place in others)`.

    Raise CannotJoin if the others differ from `first` in anything else.
    """
    if any(type(other) is not type(first) for other in others):
        raise CannotJoin
    if isinstance(first, Tensor):
        return change(first, *others)
    if isinstance(first, dict):
        if any(other.keys() != first.keys() for other in others):
            raise CannotJoin
        return {key: _mapped(change, value, *(other[key] for other in others)) for key, value in first.items()}
    if isinstance(first, list | tuple):
        if any(len(other) != len(first) for other in others):
            raise CannotJoin
        return type(first)(_mapped(change, *values) for values in zip(first, *others, strict=True))
    if _is_part(first):
        changed = copy.copy(first)
        vars(changed).update(_mapped(change, vars(first), *(vars(other) for other in others)))
        return changed
    if any(other != first for other in others):
        raise CannotJoin
    return first


def _is_part(x: Nest) -> bool:
    """Return whether `x` is a cache of transformers or a layer of one."""
    is_ours = type(x).__module__.startswith("transformers.") and hasattr(x, "__dict__")
    return is_ours and not isinstance(x, type | nn.Module | PretrainedConfig)
