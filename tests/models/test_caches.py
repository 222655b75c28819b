"""A text through any cache is the text recomputed from scratch, however often a ring has turned."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyllm.layers import KVCache
from pyllm.layers.kv_cache import PIECE
from pyllm.models import ModelConfig, Transformer

WINDOW, CONTEXT = 5, 150
# Dense: a router works in float32 whatever the model's dtype. MIXTURE is compared less strictly.
TINY = ModelConfig(
    vocab_size=61,
    max_seq_len=CONTEXT,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    d_ff=24,
    moe_every=0,
)
MIXTURE = replace(
    TINY,
    n_layers=4,
    moe_every=2,
    n_experts=5,
    n_shared_experts=1,
    router_bias=True,
    rope_scaling="yarn",
    rope_factor=4.0,
    rope_original_len=40,
    window=9,
    attention_sinks=2,
)
ROLLING = {
    "window": replace(TINY, window=WINDOW),
    "sinks": replace(TINY, window=WINDOW, attention_sinks=3),
    "wide window": replace(TINY, window=20, attention_sinks=1, n_kv_heads=1),
    "learned": replace(TINY, window=WINDOW, attention_sinks=2, position="learned"),
    "sinusoidal": replace(TINY, window=WINDOW, position="sinusoidal"),
    "window of one": replace(TINY, window=1, attention_sinks=1, n_kv_heads=4),
}
CONFIGS = {"no window": TINY, "gpt": replace(TINY, norm="layer", position="learned"), **ROLLING}
CACHES = [("no window", False), ("gpt", False), ("sinks", False)]
CACHES += [(name, True) for name in ROLLING]
IDS = [f"{name}, {'rolling' if rolling else 'contiguous'}" for name, rolling in CACHES]


INT8_ERROR = 0.03
"""Of the logits, relative, that an int8 cache may cost here."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if name.startswith(("embedding", "positions")):  # at 0.02 positions hardly matter
            parameter.normal_(std=0.4)
    return model


def some_ids(batch: int, n_tokens: int) -> Tensor:
    return torch.randint(TINY.vocab_size, (batch, n_tokens), generator=torch.Generator())


def run(model: Transformer, new: Tensor, cache: KVCache, counts: list[int] | None = None) -> Tensor:
    """The logits (B, T, V) of new tokens."""
    x_BTD, _ = model.hidden(new, cache, counts)
    return x_BTD @ model.output_weight.t()


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """In float64 two orders of the same sums differ by 1e-12; anything forgotten by 1e-2."""
    assert expected.std() > 0.2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("name", "rolling"), CACHES, ids=IDS)
def test_greedy_text_token_by_token(name: str, rolling: bool) -> None:
    """Each step against the whole text so far, recomputed from scratch without a cache."""
    model = make_model(CONFIGS[name])
    cache = model.new_cache(rolling=rolling)
    assert cache.rolling == rolling
    ids = some_ids(1, 3)
    while ids.shape[1] < 110:
        logits = run(model, ids[:, cache.length :], cache)[:, -1]
        assert_same(logits, model(ids).logits[:, -1])
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert not rolling or ids.shape[1] > 2.7 * cache.slots(0)[0].shape[1]


@pytest.mark.parametrize("block", [1, 2, PIECE, PIECE + 1, 40])
@pytest.mark.parametrize(("name", "rolling"), CACHES, ids=IDS)
def test_blocks_of_any_length(name: str, rolling: bool, block: int) -> None:
    """Prompts in one piece or many, on an empty cache and on a full one."""
    model = make_model(CONFIGS[name])
    cache = model.new_cache(2, rolling=rolling)
    ids = some_ids(2, CONTEXT)
    pieces = [run(model, new, cache) for new in ids.split(block, dim=1)]
    assert cache.length == CONTEXT
    assert_same(torch.cat(pieces, dim=1), model(ids).logits)


# New tokens of three rows, step by step: prompts of different length, rows that rest, a row that
# begins late, blocks beside single tokens.
STEPS = ([7, 1, 0], [1, 1, 0], [1, 0, 30], [0, 25, 1], *[[1, 1, 1]] * 20, [3, 0, 17], [40, 2, 1])


def next_of_each(ids: Tensor, starts: list[int], counts: Sequence[int]) -> Tensor:
    """Of each row its own number of ids, from its own place on; zeros behind them."""
    padded = torch.zeros(len(counts), max(counts), dtype=torch.long)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        padded[row, :count] = ids[row, start : start + count]
    return padded


@pytest.mark.parametrize(("name", "rolling"), CACHES, ids=IDS)
def test_rows_of_different_length(name: str, rolling: bool) -> None:
    model = make_model(CONFIGS[name])
    cache = model.new_cache(3, rolling=rolling)
    ids = some_ids(3, CONTEXT)
    expected = model(ids).logits
    for counts in STEPS:
        starts = cache.lengths.tolist()
        padded = next_of_each(ids, starts, counts)
        logits = run(model, padded, cache, counts)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            if count:
                assert_same(logits[row, :count], expected[row, start : start + count])
        assert cache.lengths.tolist() == [a + b for a, b in zip(starts, counts, strict=True)]


@pytest.mark.parametrize("rolling", [False, True], ids=["contiguous", "rolling"])
def test_a_mixture_with_everything(rolling: bool) -> None:
    """Experts, shared ones, a bias on their choice, a hybrid stack, stretched positions."""
    model = make_model(MIXTURE)
    for layer, block in enumerate(model.blocks):
        if MIXTURE.is_moe(layer):
            block.ffn.router_bias.normal_(std=0.1)
    ids = some_ids(2, CONTEXT)
    expected = model(ids).logits
    for block in (1, PIECE, 40):
        cache = model.new_cache(2, rolling=rolling)
        pieces = [run(model, new, cache) for new in ids.split(block, dim=1)]
        assert_same(torch.cat(pieces, dim=1), expected, 1e-5)


@pytest.mark.parametrize(("name", "rolling"), CACHES, ids=IDS)
def test_padding_at_the_end_of_the_context(name: str, rolling: bool) -> None:
    """The padding of a row that is nearly full would stand beyond every table."""
    model = make_model(CONFIGS[name])
    cache = model.new_cache(2, rolling=rolling)
    ids = some_ids(2, CONTEXT)
    counts = [CONTEXT - 2, 9]
    run(model, ids[:, : CONTEXT - 2], cache, counts)
    new = torch.stack([ids[0, -9:], ids[1, 9:18]])
    new[0, :2] = ids[0, -2:]
    logits = run(model, new, cache, [2, 9])
    assert_same(logits[0, :2], model(ids).logits[0, -2:])
    assert_same(logits[1], model(ids).logits[1, 9:18])


@pytest.mark.parametrize(("name", "rolling"), CACHES, ids=IDS)
def test_truncating_and_going_on_is_never_having_gone_wrong(name: str, rolling: bool) -> None:
    """In one step and in single ones; for the rolling cache as far back as it reaches."""
    model = make_model(CONFIGS[name])
    ids, wrong = some_ids(1, CONTEXT), some_ids(1, CONTEXT) + 1
    wrong %= TINY.vocab_size
    for start in (2, 90):
        for steps in ([PIECE], [1] * PIECE):
            straight, detour = (model.new_cache(1, rolling=rolling) for _ in range(2))
            for cache in (straight, detour):
                run(model, ids[:, :start], cache)
            for n_tokens in steps:
                run(model, wrong[:, :n_tokens], detour)
            detour.truncate(start)
            for at in range(start, start + 10):
                new = ids[:, at : at + 1]
                assert torch.equal(run(model, new, detour), run(model, new, straight))


@pytest.mark.parametrize("name", ROLLING)
def test_truncating_too_far_is_refused_and_from_the_front_it_works_again(name: str) -> None:
    model = make_model(CONFIGS[name])
    cache = model.new_cache(1)
    ids = some_ids(1, CONTEXT)
    run(model, ids[:, :90], cache)
    far = 90 - PIECE - 1
    if cache.window > 1:
        assert cache.within_reach(far) == [0] and cache.within_reach(far + 1) == [far + 1]
        with pytest.raises(ValueError, match=f"what position {far} of sequence 0 looks back to"):
            cache.truncate(far)
        assert cache.length == 90
    cache.truncate(0)
    assert_same(run(model, ids[:, :50], cache), model(ids[:, :50]).logits)
    # What lies behind has been written anew: that may be gone back to again.
    cache.truncate(50 - PIECE)
    new = ids[:, 50 - PIECE : 70]
    assert_same(run(model, new, cache), model(ids[:, :70]).logits[:, 50 - PIECE :])


@pytest.mark.parametrize("name", ROLLING)
def test_memory_stays_constant_over_ten_windows(name: str) -> None:
    config = replace(CONFIGS[name], max_seq_len=20_000)
    model = make_model(config)
    slots = config.window + config.attention_sinks + PIECE - 1
    one_position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * 8
    cache = model.new_cache(1)
    place = cache.slots(0)[0].data_ptr()
    n_tokens = 10 * config.window + config.attention_sinks
    ids = some_ids(1, max(n_tokens, 100))
    for token in ids.split(1, dim=1):
        run(model, token, cache)
        assert cache.nbytes == slots * one_position
    assert cache.slots(0)[0].data_ptr() == place
    assert model.new_cache(1, rolling=False).nbytes == 20_000 * one_position


def test_a_window_rolls_by_default_and_a_short_text_does_not() -> None:
    model = make_model(ROLLING["sinks"])
    assert model.new_cache().rolling and model.new_cache(3).batch == 3
    assert model.new_cache().slots(0)[0].shape[1] == 3 + WINDOW + PIECE - 1
    assert not model.new_cache(1, 20).rolling
    assert model.new_cache(1, 20).slots(0)[0].shape[1] == 20
    assert not make_model(TINY).new_cache().rolling
    with pytest.raises(ValueError, match="kv cache: a rolling cache needs a window, got None"):
        make_model(TINY).new_cache(rolling=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["no window", "sinks"])
def test_in_the_dtypes_that_models_run_in(name: str, dtype: torch.dtype) -> None:
    model = make_model(CONFIGS[name], dtype)
    cache = model.new_cache(1)
    assert cache.slots(0)[0].dtype == dtype
    ids = some_ids(1, 60)
    got = torch.cat([run(model, new, cache) for new in ids.split(1, dim=1)], dim=1)
    wanted = model.double()(ids).logits
    assert (got - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("name", ["no window", "sinks"])
def test_under_autocast(name: str) -> None:
    model = make_model(CONFIGS[name], torch.float32)
    cache, ids = model.new_cache(1), some_ids(1, 60)
    wanted = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pieces = [model(new, cache=cache).logits for new in ids.split([20, 1, 30, 9], dim=1)]
    assert cache.slots(0)[0].dtype == torch.float32
    assert (torch.cat(pieces, dim=1) - wanted).norm() / wanted.norm() < 0.03


@pytest.mark.parametrize(("name", "rolling"), CACHES, ids=IDS)
def test_an_int8_cache_gives_the_same_in_any_pieces(name: str, rolling: bool) -> None:
    """What a block sees of itself went through the integers, too. Near the float cache's logits,
    but not as near as that they could be these."""
    model = make_model(CONFIGS[name])
    ids = some_ids(2, CONTEXT)
    exact = model(ids).logits
    first = None
    for block in (1, PIECE, 40):
        cache = model.new_cache(2, rolling=rolling, dtype=torch.int8)
        logits = torch.cat([run(model, new, cache) for new in ids.split(block, dim=1)], dim=1)
        first = logits if first is None else first
        assert_same(logits, first)
    error = float((first - exact).norm() / exact.norm())
    assert 1e-4 < error < INT8_ERROR


@pytest.mark.parametrize("rolling", [False, True], ids=["contiguous", "rolling"])
def test_an_int8_cache_of_rows_of_different_length(rolling: bool) -> None:
    model = make_model(CONFIGS["sinks"])
    together = model.new_cache(3, rolling=rolling, dtype=torch.int8)
    alone = [model.new_cache(1, rolling=rolling, dtype=torch.int8) for _ in range(3)]
    ids = some_ids(3, CONTEXT)
    for counts in STEPS:
        starts = together.lengths.tolist()
        padded = next_of_each(ids, starts, counts)
        logits = run(model, padded, together, counts)
        for row, count in enumerate(counts):
            if count:
                one = run(model, padded[row : row + 1, :count], alone[row])
                assert_same(logits[row, :count], one[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_scale_is_beyond_what_int8_costs(dtype: torch.dtype) -> None:
    """The bound of the test above, and one for bfloat16, would not let one pass."""
    model = make_model(CONFIGS["sinks"], dtype)
    ids = some_ids(1, 60)
    exact = make_model(CONFIGS["sinks"], dtype).double()(ids).logits
    spoils = {
        "none": lambda scales: scales,
        "of the other head": lambda scales: scales.roll(1, dims=-1),
        "of the slot before": lambda scales: scales.roll(1, dims=-2),
        "keys' for values": lambda scales: scales.flip(1),
        "left out": lambda scales: torch.ones_like(scales) / 50,
    }
    for name, spoil in spoils.items():
        cache = model.new_cache(1, dtype=torch.int8)
        run(model, ids[:, :50], cache)
        cache.scales.copy_(spoil(cache.scales.clone()))
        error = (run(model, ids[:, 50:51], cache)[0, 0] - exact[0, 50]).norm() / exact[0, 50].norm()
        assert (error < INT8_ERROR) == (name == "none"), f"{name}: {error:.4f}"


BAD_COUNTS = [
    ([1], "counts must be 2 whole numbers for a cache of 2 sequences, got \\[1\\] for one of 2"),
    (3, "counts must be 2 whole numbers .*, got 3"),
    (torch.tensor(3), "counts must be 2 whole numbers .*, got 3"),
    ([3, 4], "counts must be a whole number from 0 to 3, got 4"),
    ([-1, 3], "counts must be a whole number from 0 to 3, got -1"),
    (torch.tensor([1.0, 2.0]), "counts must be a whole number from 0 to 3, got 1.0"),
]


@pytest.mark.parametrize(("counts", "message"), BAD_COUNTS)
def test_counts_that_are_none(counts: object, message: str) -> None:
    model = make_model(TINY)
    cache = model.new_cache(2)
    with pytest.raises(ValueError, match=f"Transformer: {message}"):
        model.hidden(some_ids(2, 3), cache, counts)
    assert cache.length == 0


def test_caches_that_do_not_fit() -> None:
    model = make_model(ROLLING["sinks"])
    ids = some_ids(2, 3)
    with pytest.raises(ValueError, match="counts are for a kv cache, got .* without one"):
        model.hidden(ids, None, [3, 3])
    cache = model.new_cache(3)
    run(model, some_ids(3, 3), cache, [1, 2, 3])
    with pytest.raises(ValueError, match=r"input_ids must have shape \(3, T\), got \(2, 3\)"):
        run(model, ids, cache)
    for other in ("window", "wide window"):
        foreign = make_model(replace(ROLLING[other], n_kv_heads=2)).new_cache(2)
        message = "kv cache: it rolls with a window of .* the layer has a window of 5 and 3"
        with pytest.raises(ValueError, match=message):
            run(model, ids, foreign)
    with pytest.raises(ValueError, match="151 tokens do not fit into the model's context of 150"):
        cache.advance([0, 0, CONTEXT - 3])
        run(model, some_ids(3, 2), cache, [2, 2, 1])
