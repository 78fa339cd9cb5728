"""Rows of a cache of transformers, of any kind: select and repeat them, pad them, and join caches.

A cache is a nest of objects of transformers, lists and dicts with tensors: keys, values, states of convolutions and
recurrences. transformers' own methods cover only some of them. Functions here work on all tensors whose first
dimension is the rows, and leave the others, such as the size of a window, as they are. Only keys and values have
a dimension for the tokens. A cache changes in place, one tensor after another, so that selecting and padding
rows takes memory for one tensor more, and joining for the joined cache and its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Nest = Any
"""A cache, or a part of one."""


class CannotJoin(Exception):
    """Caches that differ in more than their rows."""


class UnusableCache(Exception):
    """A reason not to use a model's cache."""


def select(cache: Nest, rows: int, index: Tensor) -> Nest:
    """Keep the rows `index`, which may repeat, of a cache with `rows` rows; return it."""
    return _changed(lambda x: x.index_select(0, index) if _has_rows(x, rows) else x, cache)


def join(caches: Sequence[Nest], rows: Sequence[int]) -> Nest:
    """Add the rows of the other caches to the first; return it.

    Raise CannotJoin, with nothing changed, if they differ in structure, length or any setting.
    """

    def have_rows(parts: Sequence[Tensor]) -> bool:
        first = parts[0]
        return all(
            _has_rows(part, number) and (part.shape[1:], part.dtype) == (first.shape[1:], first.dtype)
            for part, number in zip(parts, rows, strict=True)
        )

    def checked(*parts: Tensor) -> Tensor:
        first = parts[0]
        if not have_rows(parts) and any(part.shape != first.shape or not torch.equal(part, first) for part in parts):
            raise CannotJoin
        return first

    _changed(checked, *caches)
    return _changed(lambda *parts: torch.cat(parts) if have_rows(parts) else parts[0], *caches)


def has_keys(cache: Nest) -> bool:
    """Return whether a layer of the cache has keys and values of every token, or of a window."""
    return any(_has_keys(layer) for layer in getattr(cache, "layers", []))


def _has_keys(layer: Nest) -> bool:
    return isinstance(layer, DynamicLayer) and layer.keys is not None


def pad_left(cache: Nest, tokens: int) -> Nest:
    """Put so many more tokens before the keys and values of a cache, or remove some if negative; return it."""
    for layer in getattr(cache, "layers", []):
        if tokens and _has_keys(layer):
            _pad_layer(layer, tokens)
    return cache


def _pad_layer(layer: DynamicLayer, tokens: int) -> None:
    assert layer.keys is not None and layer.values is not None
    length = layer.get_seq_length() + tokens
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length
        length = min(length, layer.sliding_window - 1)
    before = (0, 0, length - layer.keys.shape[-2], 0)
    layer.keys = F.pad(layer.keys, before)
    layer.values = F.pad(layer.values, before)


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
    _changed(lambda x: found.append(x) or x, cache)  # type: ignore[func-returns-value]
    yield from found


def _changed(change: Callable[..., Tensor], first: Nest, *others: Nest) -> Nest:
    """Put `change(tensor, *tensors at the same place in others)` in the place of each tensor of `first`; return it.

    Raise CannotJoin if the others differ from `first` in anything else.
    """
    if any(type(other) is not type(first) for other in others):
        raise CannotJoin
    if isinstance(first, Tensor):
        return change(first, *others)
    if isinstance(first, dict):
        if any(other.keys() != first.keys() for other in others):
            raise CannotJoin
        for key in first:
            first[key] = _changed(change, first[key], *(other[key] for other in others))
    elif isinstance(first, list | tuple):
        if any(len(other) != len(first) for other in others):
            raise CannotJoin
        items = range(len(first))
        if isinstance(first, tuple):
            return type(first)(_changed(change, first[i], *(other[i] for other in others)) for i in items)
        for i in items:
            first[i] = _changed(change, first[i], *(other[i] for other in others))
    elif _is_part(first):
        _changed(change, vars(first), *map(vars, others))
    elif any(other != first for other in others):
        raise CannotJoin
    return first


def _is_part(x: Nest) -> bool:
    """Return whether `x` is a cache of transformers or a layer of one."""
    is_ours = type(x).__module__.startswith("transformers.") and hasattr(x, "__dict__")
    return is_ours and not isinstance(x, type | nn.Module | PretrainedConfig)
