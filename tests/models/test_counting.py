"""Parameters and operations are counted right: against the model, and against PyTorch's count."""

from dataclasses import replace
from math import prod

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pyllm.models import PRESETS, ModelConfig, Transformer, count_flops, count_parameters, preset

SMALL = ModelConfig(vocab_size=96, max_seq_len=64, n_layers=4, d_model=32, d_ff=24)
CONFIGS = PRESETS | {
    "small": SMALL,
    "hybrid": replace(SMALL, moe_every=2),
    "untied": replace(SMALL, tie_embeddings=False),
    "window": replace(SMALL, window=7),
    "sinks": replace(SMALL, window=7, attention_sinks=3),
    "shared experts": replace(SMALL, n_shared_experts=2, router_bias=True),
    "hybrid, shared experts": replace(SMALL, moe_every=2, n_shared_experts=2),
    "one kv head": replace(SMALL, n_kv_heads=1),
    "sinusoidal, layer": replace(SMALL, position="sinusoidal", norm="layer"),
    "dense gelu": replace(SMALL, moe_every=0, activation="gelu"),
}


@pytest.mark.parametrize(
    ("name", "total", "active", "tolerance"),
    [
        ("moe-158m-gpt", 158e6, 22e6, 0.01),
        ("moe-158m", 157.9e6, 20.7e6, 0.005),
        ("dense-21m", 46.4e6, 20.6e6, 0.005),
        ("dense-50m", 49.3e6, 23.6e6, 0.005),
        ("dense-124m", 124e6, 85e6, 0.01),
        ("dense-500m", 500e6, 429e6, 0.02),
        ("dense-1b", 1e9, 902e6, 0.01),
        ("dense-3b", 3e9, 2.82e9, 0.02),
    ],
)
def test_the_presets_have_the_size_in_their_name(name, total, active, tolerance):
    count = count_parameters(preset(name))
    assert count.total == pytest.approx(total, rel=tolerance)
    assert count.active == pytest.approx(active, rel=tolerance)


def test_the_dense_twin_computes_as_much_as_the_mixture_but_for_the_router():
    sparse, dense = preset("moe-158m"), preset("dense-21m")
    routers = sparse.n_layers * sparse.n_experts * sparse.d_model
    difference = count_parameters(sparse).active - count_parameters(dense).active
    assert difference == routers


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_follow_from_the_shapes(config):
    """The sizes of all matrices, written down from the architecture."""
    width, heads = config.d_model, config.n_heads + 2 * config.n_kv_heads
    gates = 3 if config.activation == "swiglu" else 2
    norm = width * (2 if config.norm == "layer" else 1)
    expert = gates * width * config.d_ff
    sparse, dense = config.n_moe_layers, config.n_layers - config.n_moe_layers
    dense_mlp = expert
    if config.moe_every:  # every layer has the same active compute
        dense_mlp *= config.top_k + config.n_shared_experts
    embedding = config.vocab_size * width * (1 if config.tie_embeddings else 2)
    embedding += config.max_seq_len * width * (config.position == "learned")
    shared = config.n_layers * (heads * config.head_dim * width + width * width + 2 * norm) + norm
    shared += sparse * config.n_experts * width + dense * dense_mlp
    shared += sparse * config.n_shared_experts * expert

    count = count_parameters(config)
    assert count.embedding == embedding
    assert count.experts == sparse * config.n_experts * expert
    assert count.total == embedding + shared + count.experts
    assert count.active == shared + sparse * config.top_k * expert


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_those_of_the_module(config):
    with torch.device("meta"):  # shapes only: the big presets take no memory
        model = Transformer(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def attention_flops(q_shape, k_shape, v_shape, scale, causal, window, sinks, face, out_shape=None):
    """Pairs of a query and a key it sees, counted one by one; 2 products of K, 2 operations."""
    batch, n_queries, n_heads, head_dim = q_shape
    pairs = 0
    for t in range(n_queries):
        pairs += sum(not window or t - s < window or s < sinks for s in range(t + 1))
    return 2 * 2 * head_dim * batch * n_heads * pairs


def moe_flops(x_shape, w_in_shape, w_out_shape, weights_shape, *_, out_shape=None):
    """Every routed row meets one expert's two matrices."""
    return 2 * prod(weights_shape) * (prod(w_in_shape[1:]) + prod(w_out_shape[1:]))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("n_tokens", [1, 50])
def test_operations_are_those_that_pytorch_counts(config, n_tokens):
    operations = {
        torch.ops.pyllm.attention_forward: attention_flops,
        torch.ops.pyllm.moe_ffn_forward: moe_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=operations)
    with FakeTensorMode():  # shapes only: the big presets take no memory
        model = Transformer(config)
        ids = torch.zeros(1, n_tokens, dtype=torch.long)
        with counter:
            model(ids)
    assert count_flops(config, n_tokens).total == counter.get_total_flops()


def test_sparsity_saves_what_the_experts_that_do_not_run_would_take():
    flops = count_flops(preset("moe-158m-gpt"), 16)
    assert flops.saved_by_sparsity == pytest.approx(1 - 2 / 16)
    assert flops.experts_dense == 8 * flops.experts
    assert count_flops(preset("dense-21m"), 16).saved_by_sparsity == 0.0
