"""The key-value cache: what goes in is where it should be, and it says when it is full."""

import pytest
import torch
from torch import Tensor

from pyllm.layers import CausalSelfAttention, KVCache
from pyllm.layers.kv_cache import PIECE


def numbered(batch: int, start: int, count: int) -> Tensor:
    """(B, T, 1, 1): each position's own number, the same in every row."""
    return torch.arange(start, start + count).float().view(1, count, 1, 1).expand(batch, -1, -1, -1)


def held(cache: KVCache, row: int = 0) -> list[float]:
    """The numbers in the slots of the first layer."""
    k_cache, v_cache = cache.slots(0)
    assert torch.equal(k_cache, v_cache)
    return k_cache[row].flatten().tolist()


def append(cache: KVCache, *steps: int) -> None:
    """So many numbered positions at a time."""
    for count in steps:
        new = numbered(cache.batch, cache.length, count)
        cache.append(0, new, new)
        cache.advance(count)


def test_what_was_appended_is_there_layer_by_layer():
    cache = KVCache(2, 3, 10, 2, 4)
    k, v = torch.randn(2, 2, 3, 7, 2, 4)
    for start, end in ((0, 4), (4, 5), (5, 7)):
        for layer in range(2):
            at = cache.append(layer, k[layer, :, start:end], v[layer, :, start:end])
            assert [one.tolist() for one in at] == [[start] * 3, [end - start] * 3]
            keys, values = cache.slots(layer)
            assert torch.equal(keys[:, :end], k[layer, :, :end])
            assert torch.equal(values[:, :end], v[layer, :, :end])
        cache.advance(end - start)
    assert cache.length == 7 and cache.max_length == 10 and cache.is_even
    assert torch.equal(cache.lengths, torch.full((3,), 7, dtype=torch.int32))


def test_a_rolling_cache_keeps_the_sinks_and_the_end():
    cache = KVCache(1, 1, 1000, 1, 1, window=3, sinks=2, rolling=True)
    ring = 3 + PIECE - 1
    assert cache.rolling and cache.nbytes == 2 * (2 + ring) * 4
    append(cache, *[1] * 50)
    assert held(cache)[:2] == [0, 1]
    assert sorted(held(cache)[2:]) == list(range(50 - ring, 50))
    append(cache, 500)
    assert held(cache)[:2] == [0, 1]
    assert sorted(held(cache)[2:]) == list(range(550 - ring, 550))
    assert cache.length == 550


def test_rows_of_different_length():
    cache = KVCache(1, 3, 8, 1, 1)
    new = numbered(3, 0, 4)
    starts, counts = cache.append(0, new, new, [4, 0, 2])
    assert (starts.tolist(), counts.tolist()) == ([0, 0, 0], [4, 0, 2])
    cache.advance([4, 0, 2])
    assert cache.lengths.tolist() == [4, 0, 2] and cache.length == 4 and not cache.is_even
    starts, counts = cache.append(0, new + 10, new + 10, torch.tensor([1, 4, 4]))
    assert (starts.tolist(), counts.tolist()) == ([4, 0, 2], [1, 4, 4])
    cache.advance(torch.tensor([1, 4, 4]))
    assert [held(cache, row) for row in range(3)] == [
        [0, 1, 2, 3, 10, 0, 0, 0],
        [10, 11, 12, 13, 0, 0, 0, 0],
        [0, 1, 10, 11, 12, 13, 0, 0],
    ]
    cache.truncate([0, 4, 3])
    assert cache.lengths.tolist() == [0, 4, 3]


def test_a_block_in_pieces():
    """Rows whose tokens end before a piece begins stay where they are."""
    cache = KVCache(1, 2, 8, 1, 1)
    new = numbered(2, 0, 6)
    cache.append(0, new[:, :4], new[:, :4], [6, 3])
    starts, counts = cache.append(0, new[:, 4:], new[:, 4:], [6, 3], before=4)
    assert (starts.tolist(), counts.tolist()) == ([4, 3], [2, 0])
    cache.advance([6, 3])
    assert held(cache, 0)[:6] == [0, 1, 2, 3, 4, 5] and held(cache, 1)[:4] == [0, 1, 2, 0]


def test_truncating_forgets_the_end_only():
    cache = KVCache(1, 1, 6, 1, 1)
    append(cache, 6)
    cache.truncate(4)
    assert cache.length == 4
    new = torch.full((1, 1, 1, 1), 9.0)
    cache.append(0, new, new)
    assert held(cache) == [0, 1, 2, 3, 9, 5]


def test_a_rolling_cache_truncates_as_far_as_it_can_see():
    """At 50, with a window of 3 and PIECE - 1 slots more, positions 50 - PIECE - 2 to 49 are held;
    the query at 50 - PIECE looks back to the first of them."""
    cache = KVCache(1, 2, 1000, 1, 1, window=3, sinks=2, rolling=True)
    append(cache, 50)
    far = 50 - PIECE
    assert cache.within_reach([far - 1, far]) == [0, far] and cache.within_reach(50) == [50, 50]
    assert cache.within_reach([2, 3]) == [2, 0]  # the query at 2 sees the sinks and itself
    with pytest.raises(ValueError, match=f"{far - 1} of sequence 1 .* at least {far}, or to 0 and"):
        cache.truncate([far, far - 1])
    assert cache.lengths.tolist() == [50, 50]
    cache.truncate([far, 2])
    new = numbered(2, 0, 5)
    cache.append(0, new, new)
    cache.advance(5)
    # Row 0 wrote over nothing that it had not lost before; row 1 holds 2 to 6 again.
    assert cache.within_reach([far, 4]) == [far, 4]
    assert cache.within_reach([far - 1, 3]) == [0, 3]


def test_what_was_written_and_not_advanced_counts_as_written():
    """An exception in a later layer leaves this one's slots used."""
    cache = KVCache(1, 1, 1000, 1, 1, window=3, rolling=True)
    append(cache, 50)
    new = numbered(1, 50, 5)
    cache.append(0, new, new)
    assert cache.within_reach(50 - PIECE + 4) == [0]
    assert cache.within_reach(50 - PIECE + 5) == [50 - PIECE + 5]


def test_an_unfinished_step_that_wrote_too_far_is_noticed():
    """More than a piece, as an exception in a later layer leaves it."""
    cache = KVCache(2, 1, 1000, 1, 1, window=3, rolling=True)
    for layer in range(2):
        cache.append(layer, numbered(1, 0, 50), numbered(1, 0, 50))
    cache.advance(50)
    new = numbered(1, 50, PIECE + 1)
    cache.append(0, new, new)
    cache.append(1, new[:, :PIECE], new[:, :PIECE])
    cache.append(1, new[:, PIECE:], new[:, PIECE:], before=PIECE)  # the same step goes on
    assert cache.within_reach(50) == [0]
    for layer in range(2):
        with pytest.raises(ValueError, match="a step that was not finished has written over what"):
            cache.append(layer, new[:, :1], new[:, :1])
    cache.truncate(0)
    for layer in range(2):
        cache.append(layer, new, new)


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


def test_a_rolling_cache_is_full_at_its_length_too():
    cache = KVCache(1, 1, 40, 1, 1, window=3, rolling=True)
    assert cache.rolling
    append(cache, 39)
    with pytest.raises(ValueError, match="41 positions do not fit into 40"):
        append(cache, 2)
    append(cache, 1)


@pytest.mark.parametrize("value", [[1], [1, 1, 1], torch.tensor([1]), []])
def test_not_one_number_for_each_sequence(value):
    cache = KVCache(1, 2, 4, 1, 1)
    message = "must be a whole number, or one for each of the 2 sequences, got"
    for method in (cache.advance, cache.truncate, cache.within_reach):
        with pytest.raises(ValueError, match=f"kv cache: the .* {message}"):
            method(value)
    with pytest.raises(ValueError, match=f"kv cache: counts {message}"):
        cache.append(0, numbered(2, 0, 1), numbered(2, 0, 1), value)


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
    ("sizes", "options", "message"),
    [
        ((2, 0, 10, 2, 4), {}, "batch must be a whole number from 1 to 2,147,483,647, got 0"),
        ((2, 3, 10.0, 2, 4), {}, "max_length must be a whole number from 1 to .*, got 10.0"),
        ((True, 3, 10, 2, 4), {}, "n_layers must be a whole number from 1 to .*, got True"),
        ((2, 10**9, 10**6, 2, 4), {}, "1,000,000 positions for 1,000,000,000 seq.* takes .* GB"),
        ((2, 3, 10, 2, 4), {"window": 0}, "window must be a whole number from 1 to .*, got 0"),
        ((2, 3, 10, 2, 4), {"sinks": -1}, "sinks must be a whole number of at least 0, got -1"),
        ((2, 3, 10, 2, 4), {"rolling": True}, "a rolling cache needs a window, got None"),
    ],
)
def test_a_cache_of_impossible_size(sizes, options, message):
    with pytest.raises(ValueError, match=f"kv cache.*{message}"):
        KVCache(*sizes, **options)


def test_gradients_do_not_flow_through_a_cache():
    wants = torch.zeros(3, 2, 2, 4, requires_grad=True)
    cache = KVCache(2, 3, 10, 2, 4)
    for k, v in ((wants, wants.detach()), (wants.detach(), wants)):
        with pytest.raises(ValueError, match="gradients do not flow through it; .*inference_mode"):
            cache.append(0, k, v)
    with torch.no_grad():
        cache.append(0, wants, wants)


@pytest.mark.parametrize("made", ["inside", "outside"])
def test_a_cache_of_inference_mode_serves_outside_of_it_and_the_other_way_round(made):
    layer, x = CausalSelfAttention(8, 2, 1, window=4), torch.randn(1, 3, 8)
    with torch.inference_mode(made == "inside"):
        cache = KVCache(1, 1, 100, 1, 4, window=4, rolling=True)
    results = []
    for mode in (torch.inference_mode(), torch.no_grad(), torch.inference_mode()):
        with mode:
            results.append(layer(x, None, cache))
            cache.advance(3)
    assert torch.equal(results[1], results[2]) and not torch.equal(results[0], results[1])


@pytest.mark.parametrize("steps", [[1], [4], [9], [PIECE], [50], [1] * 70, [30, 25]])
def test_looking_back_gives_the_sinks_and_the_window_in_order(steps: list[int]):
    rolls = KVCache(2, 1, 1000, 1, 1, window=5, sinks=3, rolling=True)
    grows = KVCache(1, 2, 1000, 1, 1, window=5, sinks=3)
    for cache in (rolls, grows):
        append(cache, *steps)
    length = sum(steps)
    keys, values = rolls.look_back(0)
    seen = [*range(min(3, length)), *range(max(3, length - 4), length)]
    assert keys.flatten().tolist() == values.flatten().tolist() == seen
    keys, values = grows.look_back(0)
    assert keys[1].flatten().tolist() == values[0].flatten().tolist() == list(range(length))


def test_only_sequences_of_one_length_look_back_together():
    cache = KVCache(1, 2, 8, 1, 1)
    new = numbered(2, 0, 3)
    cache.append(0, new, new, [3, 1])
    cache.advance([3, 1])
    with pytest.raises(ValueError, match=r"only sequences of one length .* got \[3, 1\]"):
        cache.look_back(0)


@pytest.mark.parametrize("steps", [[3], [1] * 70, [30, 25]])
def test_an_int8_cache_holds_integers_and_scales(steps: list[int]):
    """In about half of bfloat16's memory; a position comes back within half a step of its scale."""
    sizes = {"window": 5, "sinks": 3, "rolling": True, "dtype": torch.int8}
    cache, exact = (
        KVCache(2, 1, 1000, 2, 64, **sizes),
        KVCache(2, 1, 1000, 2, 64, window=5, sinks=3),
    )
    slots = 3 + 5 + PIECE - 1
    assert cache.nbytes == 2 * 2 * slots * 2 * (64 + 4) < 0.54 * 2 * 2 * slots * 2 * 128
    assert exact.scales is None and exact.scales_of(0) == (None, None)
    for count in steps:
        k, v = torch.randn(2, 1, count, 2, 64) * torch.logspace(-2, 2, count)[:, None, None]
        for one in (cache, exact):
            for layer in range(2):
                one.append(layer, k, (1 + layer) * v)
            one.advance(count)
    length = sum(steps)
    seen = [*range(min(3, length)), *range(max(3, length - 4), length)]
    for layer in range(2):
        found = cache.look_back(layer)
        for got, whole in zip(found, exact.look_back(layer), strict=True):
            wanted = whole[:, seen]
            assert got.dtype == torch.float32 and got.shape == wanted.shape
            step = wanted.abs().amax(-1, keepdim=True) / 127
            assert ((got - wanted).abs() <= 0.5001 * step).all() and not torch.equal(got, wanted)
            assert torch.equal(got, cache.as_held(wanted))
        doubles = cache.look_back(layer, torch.float64)
        assert all(one.dtype == torch.float64 for one in doubles)
        torch.testing.assert_close(doubles[0].float(), found[0])


def test_the_memory_of_an_int8_cache_is_counted_with_its_scales():
    with pytest.raises(ValueError, match=r"a kv cache of 1,000,000 positions .* takes .* GB"):
        KVCache(2, 10**9, 10**6, 2, 4, dtype=torch.int8)
    for dtype in (torch.uint8, torch.int32, torch.bool, "int8", None):
        with pytest.raises(ValueError, match="kv cache: dtype must be floating point or int8, got"):
            KVCache(1, 1, 4, 1, 4, dtype=dtype)
