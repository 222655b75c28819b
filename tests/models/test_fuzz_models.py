"""Any settings: refused for a reason, or a model of the size that was counted and that works."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pyllm.layers._checks import MAX_NUMBERS
from pyllm.models import ModelConfig, Transformer, count_parameters

pytestmark = pytest.mark.fuzz

CHOICES = {
    "norm": ["rms", "layer"],
    "position": ["rope", "learned", "sinusoidal"],
    "activation": ["swiglu", "gelu"],
    "rope_scaling": ["none", "linear", "llama3", "yarn"],
}
FLAGS = ("tie_embeddings", "router_bias")
OPTIONAL = ("window", "rope_original_len")
MAY_BE_ZERO = ("moe_every", "attention_sinks", "n_shared_experts")
LARGEST = {"n_layers": 10_000}
RANGES = {"norm_eps": (1e-12, 1), "rope_theta": (1, 1e30), "rope_factor": (1, 1e6)}

JUNK = st.one_of(
    st.integers(),
    st.integers(0, 40),
    st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30, 10**400, 1e-13, 1e-300, 1e300]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=4),
    st.sampled_from(["rms", "rope", "gelu", "512", "1e-5", "True", "\n\n"]),
    st.integers(-3, 40).map(np.int64),
    st.floats(0, 2).map(np.float64),
    st.floats(0, 2, width=32).map(np.float32),
    st.lists(st.integers(), max_size=2),
    st.just(np.zeros((2, 2))),
    st.just(1j),
)


@st.composite
def small_settings(draw):
    """Settings that work, of models so small that one takes a millisecond."""
    position = draw(st.sampled_from(CHOICES["position"]))
    n_kv_heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    head_dim = draw(st.integers(1, 3)) * (2 if position == "rope" else 1)
    n_experts = draw(st.integers(1, 4))
    n_layers = draw(st.integers(1, 3))
    moe_every = draw(st.integers(0, n_layers))
    window = draw(st.none() | st.integers(1, 7))
    scaling = draw(st.sampled_from(CHOICES["rope_scaling"])) if position == "rope" else "none"
    return {
        "vocab_size": draw(st.integers(1, 7)),
        "max_seq_len": draw(st.integers(1, 6)),
        "n_layers": n_layers,
        "d_model": head_dim * n_kv_heads * groups,
        "n_heads": n_kv_heads * groups,
        "n_kv_heads": n_kv_heads,
        "d_ff": draw(st.integers(1, 5)),
        "norm": draw(st.sampled_from(CHOICES["norm"])),
        "norm_eps": draw(st.floats(1e-12, 1)),
        "position": position,
        "rope_theta": draw(st.floats(1, 1e30)),
        "activation": draw(st.sampled_from(CHOICES["activation"])),
        "n_experts": n_experts,
        "top_k": draw(st.integers(1, n_experts)),
        "moe_every": moe_every,
        "n_shared_experts": draw(st.integers(0, 2)) if moe_every else 0,
        "router_bias": draw(st.booleans()) if moe_every else False,
        "window": window,
        "attention_sinks": draw(st.integers(0, 3)) if window else 0,
        "rope_scaling": scaling,
        "rope_factor": 1.0 if scaling == "none" else draw(st.floats(1, 1e6)),
        "rope_original_len": None if scaling == "none" else draw(st.integers(1, 9)),
        "tie_embeddings": draw(st.booleans()),
    }


@st.composite
def any_settings(draw):
    """Settings that work, and up to three that may not."""
    settings = draw(small_settings())
    for _ in range(draw(st.integers(0, 3))):
        settings[draw(st.sampled_from(list(settings)))] = draw(JUNK)
    return settings


def is_sound(settings):
    """The rules, written down once more."""
    for name, value in settings.items():
        if name in CHOICES:
            good = type(value) is str and value in CHOICES[name]
        elif name in FLAGS:
            good = type(value) is bool
        elif name in RANGES:
            low, high = RANGES[name]
            good = type(value) in (int, float, np.float64) and low <= value <= high
        elif value is None:
            good = name in OPTIONAL
        else:
            most = LARGEST.get(name, 2**31 - 1)
            least = 0 if name in MAY_BE_ZERO else 1
            good = type(value) in (int, np.int64) and least <= value <= most
        if not good:
            return False
    width, heads, kv_heads = (settings[name] for name in ("d_model", "n_heads", "n_kv_heads"))
    return (
        width % heads == 0
        and heads % kv_heads == 0
        and (settings["position"] != "rope" or (width // heads) % 2 == 0)
        and (settings["moe_every"] == 0 or settings["top_k"] <= settings["n_experts"])
        and settings["moe_every"] <= settings["n_layers"]
        and settings["d_ff"] * settings["n_shared_experts"] < 2**31
        and (
            settings["moe_every"] < 2
            or settings["d_ff"] * (settings["top_k"] + settings["n_shared_experts"]) < 2**31
        )
        and (settings["moe_every"] or not settings["n_shared_experts"])
        and (settings["moe_every"] or not settings["router_bias"])
        and (settings["window"] is not None or not settings["attention_sinks"])
        and is_sound_scaling(**{k: v for k, v in settings.items() if k in SCALING})
    )


SCALING = ("rope_scaling", "rope_factor", "rope_original_len", "position")


def is_sound_scaling(rope_scaling, rope_factor, rope_original_len, position):
    if rope_scaling == "none":
        return rope_factor == 1 and rope_original_len is None
    return position == "rope" and (rope_scaling == "linear" or rope_original_len is not None)


@given(any_settings())
def test_settings_are_refused_or_counted_right(watchdog, settings):
    watchdog()
    if not is_sound(settings):
        with pytest.raises(ValueError, match="^ModelConfig: [^\n]{10,300}$"):
            ModelConfig(**settings)
        return
    config = ModelConfig(**settings)
    assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config
    counted = count_parameters(config)
    assume(config.n_layers < 50)  # what more layers cost is time, even without memory
    with torch.device("meta"):
        if counted.total > MAX_NUMBERS:
            with pytest.raises(ValueError, match="is larger than any; expected at most"):
                Transformer(config)
            return
        model = Transformer(config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    experts = [block.ffn for block in model.blocks if hasattr(block.ffn, "router")]
    assert len(experts) == config.n_moe_layers
    assert counted.experts == sum(ffn.w_in.numel() + ffn.w_out.numel() for ffn in experts)
    idle = counted.experts * (config.n_experts - config.top_k) // config.n_experts
    assert counted.active == counted.total - counted.embedding - (idle if experts else 0)


@given(small_settings(), st.integers(0, 2), st.integers(0, 2**32 - 1), st.data())
def test_sound_settings_make_a_model_that_works(watchdog, settings, batch, seed, data):
    watchdog()
    config = ModelConfig(**settings)
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    n_tokens = data.draw(st.integers(0, config.max_seq_len))
    ids = torch.randint(config.vocab_size, (batch, n_tokens))
    with torch.inference_mode():
        logits = model(ids).logits
        assert logits.shape == (batch, n_tokens, config.vocab_size)
        assert logits.isfinite().all()
        loss = model(ids, ids).loss
        wanted = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids.flatten(), reduction="sum"
        )
        assert math.isclose(loss, wanted / max(ids.numel(), 1), rel_tol=1e-4, abs_tol=1e-5)
        if batch and n_tokens:  # token by token, what came before is in the cache
            cut = data.draw(st.integers(0, n_tokens))
            cache = model.new_cache(batch, n_tokens)
            parts = [model(part, cache=cache).logits for part in (ids[:, :cut], ids[:, cut:])]
            torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-3, atol=1e-4)


@given(
    st.lists(st.lists(st.integers(-2, 8) | st.sampled_from([2**31, -(2**63)]), max_size=4)),
    st.sampled_from([torch.int64, torch.int32, torch.int16, torch.float32, torch.bool]),
)
def test_any_ids_are_refused_or_give_logits(watchdog, rows, dtype):
    watchdog()
    try:
        ids = torch.tensor(rows, dtype=torch.int64).to(dtype)
    except ValueError:  # rows of different length are no tensor
        ids = rows
    good = isinstance(ids, torch.Tensor) and dtype in (torch.int64, torch.int32) and ids.dim() == 2
    if good and bool(((ids >= 0) & (ids < 5)).all()):
        assert MODEL(ids).logits.shape == (*ids.shape, 5)
    else:
        with pytest.raises(ValueError, match="^Transformer: input_ids must [^\n]*$"):
            MODEL(ids)


MODEL = Transformer(
    replace(ModelConfig(), vocab_size=5, max_seq_len=4, n_layers=1, d_model=8, n_heads=2, d_ff=4)
)
