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
    for length in (1, -1, 0.0, True):
        with pytest.raises(ValueError, match=f"truncate to must be .* from 0 to 0, got {length}"):
            cache.truncate(length)
    for n_tokens in (5, -1, 1.0):
        with pytest.raises(ValueError, match=f"advance by must be .* from 0 to 4, got {n_tokens}"):
            cache.advance(n_tokens)


@pytest.mark.parametrize(
    ("layer", "k_shape", "v_shape", "message"),
    [
        (0, (1, 2, 2, 4), (1, 2, 2, 4), r"shape \(3, T, 2, 4\), got \(1, 2, 2, 4\)"),
        (0, (3, 2, 1, 4), (3, 2, 2, 4), r"shape \(3, T, 2, 4\), got \(3, 2, 1, 4\)"),
        (0, (3, 2, 2, 4), (3, 1, 2, 4), r"shape \(3, T, 2, 4\), got .* and \(3, 1, 2, 4\)"),
        (0, (3,), (3,), r"shape \(3, T, 2, 4\), got \(3,\)"),
        (2, (3, 2, 2, 4), (3, 2, 2, 4), "layer must be from 0 to 1, got 2"),
        (-1, (3, 2, 2, 4), (3, 2, 2, 4), "layer must be from 0 to 1, got -1"),
    ],
)
def test_keys_that_do_not_fit_are_not_spread_over_the_batch(layer, k_shape, v_shape, message):
    with pytest.raises(ValueError, match=f"kv cache: .*{message}"):
        KVCache(2, 3, 10, 2, 4).append(layer, torch.zeros(k_shape), torch.zeros(v_shape))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 0, 10, 2, 4), "batch must be a whole number from 1 to 2,147,483,647, got 0"),
        ((2, 3, 10.0, 2, 4), "max_length must be a whole number from 1 to 2,147,483,647, got 10.0"),
        ((True, 3, 10, 2, 4), "n_layers must be a whole number from 1 to 2,147,483,647, got True"),
        ((2, 10**9, 10**6, 2, 4), "1,000,000 positions for 1,000,000,000 seq.* takes .* GB of mem"),
    ],
)
def test_a_cache_of_impossible_size(sizes, message):
    with pytest.raises(ValueError, match=f"kv cache.*{message}"):
        KVCache(*sizes)


def test_gradients_do_not_flow_through_a_cache():
    wants = torch.zeros(3, 2, 2, 4, requires_grad=True)
    cache = KVCache(2, 3, 10, 2, 4)
    for k, v in ((wants, wants.detach()), (wants.detach(), wants)):
        with pytest.raises(ValueError, match="gradients do not flow through it; .*inference_mode"):
            cache.append(0, k, v)
    with torch.no_grad():
        cache.append(0, wants, wants)
