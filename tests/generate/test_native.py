"""The native path: the same numbers as PyTorch's, whatever the model and the cache."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllm.generate import SamplingConfig, Session, generate_ids, next_logits
from pyllm.generate.native import NativeModel, native_model
from pyllm.models import Int8Transformer, ModelConfig, Transformer, quantize_model

BASE = ModelConfig(
    vocab_size=97,
    max_seq_len=160,
    n_layers=3,
    d_model=48,
    n_heads=6,
    n_kv_heads=2,
    d_ff=37,
    n_experts=5,
    top_k=2,
)
FAMILY = {
    "mixture": BASE,
    "one expert": replace(BASE, n_experts=1, top_k=1),
    "all experts": replace(BASE, n_experts=3, top_k=3, d_ff=8),
    "many experts": replace(BASE, n_experts=40, top_k=1, d_ff=3),
    "dense": replace(BASE, moe_every=0),
    "hybrid": replace(BASE, moe_every=2, n_layers=4),
    "gpt": replace(
        BASE,
        norm="layer",
        position="learned",
        activation="gelu",
        n_kv_heads=6,
        tie_embeddings=False,
    ),
    "gpt, dense": replace(BASE, norm="layer", position="learned", activation="gelu", moe_every=0),
    "sinusoidal": replace(BASE, position="sinusoidal"),
    "shared": replace(BASE, n_shared_experts=2, router_bias=True),
    "window": replace(BASE, window=9),
    "sinks": replace(BASE, window=9, attention_sinks=3),
    "wide window": replace(BASE, window=70, attention_sinks=2),
    "yarn": replace(BASE, rope_scaling="yarn", rope_factor=2.0, rope_original_len=48),
    "one kv head": replace(BASE, n_kv_heads=1, d_model=66, n_heads=3),
    "heads of 64": replace(BASE, d_model=128, n_heads=2, n_kv_heads=1),
    "heads of 128": replace(BASE, d_model=256, n_heads=2, n_kv_heads=2, d_ff=130),
    "deep eps": replace(BASE, norm_eps=0.3),
}
STEPS: list[tuple[int, Sequence[int] | None]] = [
    (20, [20, 7, 13]),
    (1, None),
    (1, [1, 0, 1]),
    (90, [90, 2, 71]),  # more than one call takes
    (1, [0, 0, 1]),
    (3, [3, 0, 0]),
    (1, None),
]


def make(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide them
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    for block in model.blocks:
        if getattr(block.ffn, "router_bias", None) is not None:
            block.ffn.router_bias.normal_(std=0.2)
    return model.to(dtype).eval()


def native(model: Transformer) -> NativeModel:
    found = native_model(model)
    assert found is not None
    return found


@torch.inference_mode()
def both(
    model: Transformer, steps: Any = STEPS, layers: Transformer | None = None, **cache: Any
) -> list[tuple[Tensor, Tensor]]:
    """The logits of each step in PyTorch and native, through caches of their own.

    ``layers``: the model in PyTorch, where it is not the same.
    """
    found, layers = native(model), model if layers is None else layers
    caches = layers.new_cache(3, **cache), model.new_cache(3, **cache)
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for n_tokens, counts in steps:
        ids = torch.randint(model.config.vocab_size, (3, n_tokens), generator=generator)
        pairs.append(
            (
                next_logits(layers, ids, caches[0], counts),
                found.next_logits(ids, caches[1], counts),
            )
        )
        assert caches[0].lengths.tolist() == caches[1].lengths.tolist()
    return pairs


def error(pair: tuple[Tensor, Tensor]) -> float:
    """Largest difference, over the largest logit."""
    expected, got = pair
    assert got.dtype == torch.float32 and got.shape == expected.shape
    return float((got - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family(name: str, isa: str) -> None:
    """Ragged prefill, long blocks, single tokens, rows that stand still."""
    assert max(map(error, both(make(FAMILY[name])))) < 3e-6


@pytest.mark.parametrize("name", ["mixture", "gpt", "sinks"])
def test_contiguous_caches(name: str) -> None:
    assert max(map(error, both(make(FAMILY[name]), rolling=False))) < 3e-6


@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_is_nearer_to_the_truth(name: str, isa: str) -> None:
    """Its weights are rounded, its activations are not: PyTorch's error is the larger one."""
    model = make(FAMILY[name], torch.bfloat16)
    exact = make(FAMILY[name], torch.bfloat16).double()
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(model.config.vocab_size, (3, 20), generator=generator)
        truth = next_logits(exact, ids, exact.new_cache(3))
        plain = next_logits(model, ids, model.new_cache(3)).double()
        got = native(model).next_logits(ids, model.new_cache(3)).double()
    assert float((got - truth).norm()) < float((plain - truth).norm())


@pytest.mark.parametrize("name", FAMILY)
def test_int8(name: str, isa: str) -> None:
    """The layers of pyllm.layers.int8 are the reference: where no rounding to int8 flips, equal."""
    model = quantize_model(make(FAMILY[name]))
    pairs = both(model)
    errors = sorted(map(error, pairs))
    # A number near the middle of two integers goes the other way after another sum: 1/127 of one
    # channel. Most steps meet such a number somewhere; a wrong index would be seen in all of them.
    assert errors[len(errors) // 2] < 0.02 and errors[-1] < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["mixture", "gpt", "sinks", "wide window", "heads of 64"])
def test_int8_caches(name: str, dtype: str, isa: str) -> None:
    """Of models of every dtype. Where no rounding of a key flips, as near as with a float cache."""
    model = make(FAMILY[name], torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    # Both compute in float32; PyTorch in bfloat16 would be a third thing.
    layers = copy.deepcopy(model).float() if dtype == "bfloat16" else model
    if dtype == "int8":
        model = layers = quantize_model(model)
    errors = sorted(map(error, both(model, layers=layers, dtype=torch.int8)))
    middle, most = {"float32": (1e-5, 5e-3), "bfloat16": (5e-3, 0.02), "int8": (0.02, 0.1)}[dtype]
    assert errors[len(errors) // 2] < middle and errors[-1] < most, errors


def test_bits_do_not_depend_on_threads(set_threads: Callable[[int], None]) -> None:
    for model in (make(BASE), quantize_model(make(BASE)), make(BASE, torch.bfloat16)):
        runs = []
        for threads in (1, 2, 3, 5):
            set_threads(threads)
            runs.append([got for _, got in both(model)])
        for run in runs[1:]:
            assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


def test_a_row_gets_what_it_would_alone() -> None:
    model = make(BASE)
    found = native(model)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(97, (3, 30), generator=generator)
    with torch.inference_mode():
        together = found.next_logits(ids, model.new_cache(3))
        alone = torch.cat([found.next_logits(ids[b : b + 1], model.new_cache(1)) for b in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sessions_write_the_same_as_without(
    dtype: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, past several wraps of the window."""
    for name in ("mixture", "sinks", "gpt"):
        model = make(FAMILY[name])
        if dtype == "int8":
            model = quantize_model(model)
        config = SamplingConfig(max_new_tokens=60, greedy=True)
        options = {"kv_cache_dtype": cache}
        written = list(generate_ids(model, [1, 2, 3], config, **options))
        with monkeypatch.context() as patch:
            patch.setattr("pyllm.generate.session.native_model", lambda model: None)
            expected = list(generate_ids(model, [1, 2, 3], config, **options))
        same = next((i for i in range(60) if written[i] != expected[i]), 60)
        assert same == 60 if dtype == "float32" else same >= 5, f"{name}: {same}"


def refuses(change: Callable[[Transformer], object], config: ModelConfig = BASE) -> bool:
    model = make(config)
    assert native_model(model) is not None
    change(model)
    return native_model(model) is None


def test_who_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_model(quantize_model(make(BASE))) is not None
    assert native_model(make(BASE).half()) is None
    assert native_model(make(BASE).double()) is None
    with torch.device("meta"):
        assert native_model(Transformer(BASE)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native_model(make(BASE)) is None
    model = make(BASE)
    handle = model.blocks[1].ffn.register_forward_hook(lambda *_: None)
    assert native_model(model) is None
    handle.remove()
    assert native_model(model) is not None
    monkeypatch.setattr("pyllm.generate.native.choose_face", lambda *_: "reference")
    assert native_model(model) is None


def test_a_model_with_other_parts_goes_through_pytorch() -> None:
    one = torch.nn.Sequential(torch.nn.Identity())
    assert refuses(lambda m: setattr(m.blocks[0].ffn, "dispatcher", lambda *a: None))
    assert refuses(lambda m: setattr(m.blocks[0].attention, "out_proj", one))
    assert refuses(lambda m: m.blocks[0].attention.out_proj.bfloat16())
    assert refuses(lambda m: setattr(m, "project", lambda x: x))
    assert refuses(lambda m: setattr(m, "hidden", lambda *a: None))


def test_a_model_that_is_not_as_configured_goes_through_pytorch() -> None:
    """The plan would read past the end of what there is, or compute another model."""
    assert refuses(lambda m: m.blocks.append(make(BASE).blocks[0]))
    assert refuses(lambda m: setattr(m, "embedding", torch.nn.Embedding(20, 48)))
    assert refuses(lambda m: setattr(m, "config", replace(BASE, max_seq_len=2000)))
    assert refuses(lambda m: setattr(m, "config", replace(BASE, max_seq_len=2000)), FAMILY["gpt"])
    assert refuses(lambda m: setattr(m.blocks[2].ffn, "top_k", 1))
    assert refuses(lambda m: setattr(m.blocks[2].ffn, "activation", "gelu"))
    assert refuses(lambda m: setattr(m.blocks[1].attention, "window", 2))
    assert refuses(lambda m: setattr(m.blocks[1].attention, "sinks", 2))
    assert refuses(lambda m: setattr(m.final_norm, "eps", 0.5))
    assert refuses(lambda m: setattr(m.blocks[0].attention_norm, "eps", 0.5))
    wide = torch.nn.Parameter(torch.zeros(5, 48, 36))
    assert refuses(lambda m: setattr(m.blocks[1].ffn, "w_out", wide))
    assert refuses(lambda m: setattr(m.blocks[1], "ffn", make(FAMILY["dense"]).blocks[0].ffn))


def test_int8_beyond_int32_goes_through_pytorch_which_refuses() -> None:
    config = replace(
        BASE, moe_every=0, d_ff=132_105, n_layers=1, d_model=6, n_heads=1, n_kv_heads=1
    )
    model = Int8Transformer(config)
    assert native_model(model) is None
    with pytest.raises(ValueError, match="at most 132,104 wide"), torch.inference_mode():
        model(torch.tensor([[1]]))


@torch.inference_mode()
def test_experts_that_only_a_bias_chose() -> None:
    """Their probabilities underflow, and their weights are of their logits all the same."""
    model = make(FAMILY["shared"])
    for block in model.blocks:
        block.ffn.router *= 3000.0
        block.ffn.router_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0, 0.0]))
    assert max(map(error, both(model))) < 1e-5


@torch.inference_mode()
def test_of_equal_experts_the_first_are_chosen() -> None:
    model = make(BASE)
    for block in model.blocks:
        block.ffn.router.zero_()
    assert max(map(error, both(model))) < 1e-5


def test_a_session_sees_weights_that_were_moved_since() -> None:
    model = make(BASE)
    config = SamplingConfig(max_new_tokens=12, greedy=True)
    session = Session(model)
    session.begin([[1, 2, 3]], config)
    session.step()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    session.begin([[5, 6, 7]], config)  # shares nothing with what the cache holds
    written = [session.step()[0][1] for _ in range(12)]
    assert written == list(generate_ids(model, [5, 6, 7], config))


def test_a_session_can_be_copied() -> None:
    model = make(BASE)
    config = SamplingConfig(max_new_tokens=12, greedy=True)
    session = Session(model)
    session.begin([[1, 2, 3]], config)
    session.step()
    other = copy.deepcopy(session)
    rest = [one.step()[0][1] for one in (session, other, session, other)]
    assert rest[:2] == [rest[0]] * 2 and rest[2:] == [rest[2]] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_other_defaults_of_pytorch(dtype: torch.dtype) -> None:
    """The kernel writes and reads float32, whatever dtype and device new tensors have."""
    config, ids = replace(FAMILY["shared"], position="learned"), torch.tensor([[1, 2, 3]])
    model = make(config)
    int8 = quantize_model(model)
    expected = [native(one).next_logits(ids, one.new_cache(1)) for one in (model, int8)]
    torch.set_default_dtype(dtype)
    try:
        # Made under it, too; with the numbers of the float32 ones where they are not derived.
        other, other_int8 = make(config).float(), quantize_model(model)
        other.load_state_dict(model.state_dict())
        for one, wanted in zip(
            (model, int8, other, other_int8), [*expected, *expected], strict=True
        ):
            cache = one.new_cache(1)
            with torch.device("meta"):
                found = native(one).next_logits(ids, cache)
            assert found.dtype == torch.float32
            assert torch.equal(found, wanted)
        assert other.new_cache(1, dtype=torch.int8).scales.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@torch.inference_mode()
def test_scales_that_are_no_float32_are_refused() -> None:
    """The kernel would write twice as many bytes as float16 has."""
    ids, model = torch.tensor([[1, 2, 3]]), make(FAMILY["shared"])
    step = native(model)._step
    cache = model.new_cache(1, dtype=torch.int8)
    at = (torch.tensor([0], dtype=torch.int32), torch.tensor([3], dtype=torch.int32))
    for scales in (cache.scales.half(), cache.scales.double()):
        with pytest.raises(ValueError, match=f"must be float32, got {scales.dtype}"):
            step(ids, *at, cache.store, 0, False, 1, scales)
    with pytest.raises(ValueError, match="decode_step: an int8 cache needs scales, got None"):
        step(ids, *at, cache.store, 0, False, 1)


@pytest.mark.parametrize(
    ("ids", "cache", "message"),
    [
        ([[97]], {}, "must be between 0 and 96, got values from 97 to 97"),
        ([[-1]], {}, "must be between 0 and 96, got values from -1 to -1"),
        ([[1] * 161], {}, "161 tokens do not fit into the model's context of 160"),
        ([[1] * 9], {"max_length": 8}, "9 positions do not fit into 8"),
        ([[1], [1]], {}, "make a cache for this batch and this model"),
    ],
)
def test_bad_input(ids: list[list[int]], cache: dict[str, int], message: str) -> None:
    model = make(BASE)
    with pytest.raises(ValueError, match=message):
        native(model).next_logits(torch.tensor(ids), model.new_cache(1, **cache))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([5, 1], "counts must be a whole number from 0 to 3, got 5"),
        ([-1, 1], "counts must be a whole number from 0 to 3, got -1"),
        ([3], "counts must be 2 whole numbers"),
        ([0, 0], "expected at least one new token, got none"),
    ],
)
def test_bad_counts(counts: list[int], message: str) -> None:
    model = make(BASE)
    cache = model.new_cache(2)
    with pytest.raises(ValueError, match=message):
        native(model).next_logits(torch.ones(2, 3, dtype=torch.int64), cache, counts)
    assert cache.lengths.tolist() == [0, 0]


def test_ids_of_other_kinds() -> None:
    model = make(BASE)
    ids = torch.tensor([[1, 2, 3]])
    expected = native(model).next_logits(ids, model.new_cache(1))
    assert torch.equal(native(model).next_logits(ids.int(), model.new_cache(1)), expected)
    for wrong, message in (
        (ids.float(), "input_ids must be int32 or int64"),
        (ids.bool(), "input_ids must be int32 or int64"),
        (ids[0], r"input_ids must have shape \(B, T\)"),
        (ids.to("meta"), "one device was expected"),
    ):
        with pytest.raises(ValueError, match=message):
            native(model).next_logits(wrong, model.new_cache(1))


def test_caches_of_other_models() -> None:
    model, one = make(BASE), torch.tensor([[1]])
    for other in (
        replace(BASE, n_layers=2),
        replace(BASE, n_kv_heads=3),
        replace(BASE, d_model=96),
    ):
        with pytest.raises(ValueError, match="make a cache for this batch and this model"):
            native(model).next_logits(one, Transformer(other).new_cache(1))
    with pytest.raises(ValueError, match="make a cache for this batch and this model"):
        native(model).next_logits(one, make(BASE).double().new_cache(1))
    with pytest.raises(ValueError, match="it rolls with a window of 9 and 3 sinks, and the model"):
        native(model).next_logits(one, make(FAMILY["sinks"]).new_cache(1))


def test_nan_weights_reach_the_logits() -> None:
    model = make(BASE)
    with torch.no_grad():
        model.blocks[1].attention.qkv_proj.weight[3, 4] = float("nan")
        logits = native(model).next_logits(torch.tensor([[1, 2]]), model.new_cache(1))
    assert bool(logits.isnan().all())
