"""The key-value cache: what goes in comes out, and it says when it is full."""

import pytest
import torch

from pyllm.layers import KVCache


def test_what_was_appended_comes_back_layer_by_layer():
    cache = KVCache(2, 3, 10, 2, 4)
    k, v = torch.randn(2, 2, 3, 7, 2, 4)
    for start, end in ((0, 4), (4, 5), (5, 7)):
        for layer in range(2):
            keys, values = cache.append(layer, k[layer, :, start:end], v[layer, :, start:end])
            assert torch.equal(keys, k[layer, :, :end])
            assert torch.equal(values, v[layer, :, :end])
        cache.advance(end - start)
    assert cache.length == 7 and cache.max_length == 10


def test_truncating_forgets_the_end_only():
    cache = KVCache(1, 1, 6, 1, 2)
    k, v = torch.randn(2, 1, 6, 1, 2)
    cache.append(0, k, v)
    cache.advance(6)
    cache.truncate(4)
    new = torch.randn(1, 1, 1, 2)
    keys, _ = cache.append(0, new, new)
    assert torch.equal(keys, torch.cat([k[:, :4], new], dim=1))


def test_a_full_cache_and_an_impossible_truncation_are_value_errors():
    cache = KVCache(1, 1, 4, 1, 2)
    with pytest.raises(ValueError, match="5 positions do not fit into 4"):
        cache.append(0, torch.zeros(1, 5, 1, 2), torch.zeros(1, 5, 1, 2))
    with pytest.raises(ValueError, match="cannot truncate 0 positions to 1"):
        cache.truncate(1)
    with pytest.raises(ValueError, match="cannot truncate 0 positions to -1"):
        cache.truncate(-1)
