"""Rows of transformers' caches: selected, repeated and joined whatever a cache consists of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from RL2.engines.embedded.rows import CannotJoin, UnusableCache, bytes_per_row, has_keys, join, pad_left, select


def make_cache(rows: int, length: int, seed: int = 0) -> DynamicCache:
    torch.manual_seed(seed)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 4), layer)
    return cache


def cache_of(layer: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers.append(layer)
    return cache


def keys(cache: DynamicCache) -> Tensor:
    return torch.stack([layer.keys for layer in cache.layers])


def test_rows_are_selected_and_repeated() -> None:
    cache = make_cache(3, 5)
    before = keys(cache)
    assert select(cache, 3, torch.tensor([2, 0, 0, 1])) is cache
    assert torch.equal(keys(cache), before[:, [2, 0, 0, 1]])
    cache.update(torch.zeros(4, 2, 1, 4), torch.zeros(4, 2, 1, 4), 0)
    assert cache.get_seq_length() == 6


def test_caches_of_equal_length_join() -> None:
    one, other = make_cache(3, 5), make_cache(2, 5, seed=1)
    wanted = torch.cat([keys(one), keys(other)], dim=1)
    assert join([one, other], [3, 2]) is one
    assert torch.equal(keys(one), wanted)


def test_tuples_are_replaced() -> None:
    cache = {"a": (torch.arange(3), 1), "b": [torch.zeros(3)]}
    assert torch.equal(select(cache, 3, torch.tensor([1]))["a"][0], torch.tensor([1]))
    assert cache["b"][0].shape == (1,)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (make_cache(3, 5), make_cache(2, 6)),
        ({"a": torch.zeros(3), "step": 1}, {"a": torch.zeros(2), "step": 2}),
        ({"a": torch.zeros(3)}, {"b": torch.zeros(2)}),
        ([torch.zeros(3)], [torch.zeros(2), torch.zeros(2)]),
        ([torch.zeros(3), torch.tensor(1)], [torch.zeros(2), torch.tensor(2)]),
        (torch.zeros(3), torch.zeros(2).double()),
        (torch.zeros(3), None),
    ],
    ids=["length", "number", "key", "list", "scalar", "type", "none"],
)
def test_caches_that_differ_do_not_join(one: Any, other: Any) -> None:
    with pytest.raises(CannotJoin):
        join([one, other], [3, 2])


def test_caches_that_differ_stay_as_they_are() -> None:
    one = [torch.zeros(3), torch.tensor(1)]
    with pytest.raises(CannotJoin):
        join([one, [torch.ones(2), torch.tensor(2)]], [3, 2])
    assert torch.equal(one[0], torch.zeros(3))


def test_a_tensor_without_rows_is_found() -> None:
    assert bytes_per_row(make_cache(3, 5), 3) == 2 * 2 * 2 * 5 * 4 * 4
    assert bytes_per_row({"a": torch.zeros(3, 2), "window": torch.tensor(4), "empty": torch.tensor([])}, 3) == 8 + 8 / 3
    with pytest.raises(UnusableCache, match=r"a tensor of shape \[2, 3\] for 3 sequences"):
        bytes_per_row([torch.zeros(3), torch.zeros(2, 3)], 3)


def test_padding_is_before_keys_and_values_and_can_be_removed() -> None:
    cache = make_cache(3, 5)
    before = keys(cache)
    pad_left(cache, 2)
    assert torch.equal(keys(cache)[..., 2:, :], before)
    assert not keys(cache)[..., :2, :].any()
    assert cache.get_seq_length() == 7
    assert keys(join([make_cache(2, 7, seed=1), cache], [2, 3])).shape == (2, 5, 2, 7, 4)
    assert torch.equal(keys(pad_left(cache, -3)), before[..., 1:, :])


@pytest.mark.parametrize(("tokens", "more", "kept"), [(2, 3, 5), (5, 9, 7), (11, 4, 7), (12, -9, 3), (12, -4, 7)])
def test_padding_of_a_window_counts_all_tokens_and_keeps_its_last(tokens: int, more: int, kept: int) -> None:
    layer = DynamicSlidingWindowLayer(sliding_window=8)
    layer.update(torch.randn(1, 1, tokens, 4), torch.randn(1, 1, tokens, 4))
    before = layer.keys
    pad_left(cache_of(layer), more)
    assert layer.get_seq_length() == tokens + more
    assert layer.keys.shape[-2] == kept
    same = min(kept, before.shape[-2])
    assert torch.equal(layer.keys[..., kept - same :, :], before[..., before.shape[-2] - same :, :])


def test_states_have_no_keys() -> None:
    layer = LinearAttentionLayer()
    layer.update_recurrent_state(torch.randn(3, 4))
    cache = cache_of(layer)
    assert not has_keys(cache) and has_keys(make_cache(3, 5))
    assert pad_left(cache, 2) is cache
    assert not has_keys([torch.zeros(3)])
