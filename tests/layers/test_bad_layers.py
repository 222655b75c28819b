"""Layers refuse sizes that cannot work, and inputs of another width."""

import numpy as np
import pytest
import torch

from pyllm.layers import (
    MLP,
    CausalSelfAttention,
    LayerNorm,
    LearnedPositions,
    MoE,
    RMSNorm,
    RotaryTable,
    SinusoidalPositions,
)

EPS = "eps must be a finite number above 0, got"
THETA = "theta must be a finite number of at least 1, got"
SIZE = "must be a whole number from 1 to 2,147,483,647, got"


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        (MLP, (0, 4, "gelu"), f"MLP: width {SIZE} 0"),
        (MLP, (4, 4.0, "gelu"), f"MLP: hidden {SIZE} 4.0"),
        (MLP, (4, 4, "relu"), "MLP: activation must be one of swiglu, gelu, got 'relu'"),
        (MLP, (4, 4, None), "MLP: activation must be one of swiglu, gelu, got None"),
        (MoE, (4, 4, 2, 3, "gelu"), r"MoE: top_k \(3\) must not exceed n_experts \(2\)"),
        (MoE, (4, 4, 2, 0, "gelu"), f"MoE: top_k {SIZE} 0"),
        (MoE, (4, 4, True, 1, "gelu"), f"MoE: n_experts {SIZE} True"),
        (MoE, (4, 4, 2, 1, "relu"), "MoE: activation must be one of swiglu, gelu, got 'relu'"),
        (
            CausalSelfAttention,
            (6, 4, 2),
            r"n_kv_heads \(2\) must divide n_heads \(4\), and n_heads",
        ),
        (CausalSelfAttention, (8, 4, 3), r"n_kv_heads \(3\) must divide n_heads \(4\)"),
        (CausalSelfAttention, (8, 4, 2, 0), f"CausalSelfAttention: window {SIZE} 0"),
        (CausalSelfAttention, (8, -4, 2), f"CausalSelfAttention: n_heads {SIZE} -4"),
        (RMSNorm, (0,), f"RMSNorm: width {SIZE} 0"),
        (RMSNorm, (4, -1.0), "RMSNorm: eps must be a finite number above 0, got -1.0"),
        (LayerNorm, (4, float("nan")), f"LayerNorm: {EPS} nan"),
        (LayerNorm, (4, True), f"LayerNorm: {EPS} True"),
        (LayerNorm, (4, 10**400), f"LayerNorm: {EPS} 1000"),
        (RMSNorm, (4, 10**400), f"RMSNorm: {EPS} 1000"),
        (LayerNorm, (4, 0), f"LayerNorm: {EPS} 0"),
        (RotaryTable, (8, 3), "RotaryTable: head_dim must be even, got 3"),
        (RotaryTable, (0, 4), f"RotaryTable: max_seq_len {SIZE} 0"),
        (RotaryTable, (8, 4, 0.0), f"RotaryTable: {THETA} 0.0"),
        (RotaryTable, (8, 4, 10**400), f"RotaryTable: {THETA} 1000"),
        (RotaryTable, (8, 4, True), f"RotaryTable: {THETA} True"),
        (RotaryTable, (8, 4, "10"), f"RotaryTable: {THETA} '10'"),
        (LearnedPositions, (8, 0), f"LearnedPositions: width {SIZE} 0"),
        (SinusoidalPositions, (-8, 4), f"SinusoidalPositions: max_seq_len {SIZE} -8"),
    ],
)
def test_impossible_sizes(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(*arguments)


MOST = 2**31 - 1
MANY = 2**20
"""MANY by MANY numbers are 4 TiB: a size that may be, and no machine of ours has."""


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("layer", "arguments"),
    [
        (MLP, (MANY, MANY, "gelu")),
        (MoE, (MANY, MANY, 2, 1, "gelu")),
        (CausalSelfAttention, (MANY, 1, 1)),
        (RotaryTable, (MANY, MANY)),
        (LearnedPositions, (MANY, MANY)),
        (SinusoidalPositions, (MANY, MANY)),
    ],
)
def test_what_no_memory_holds(layer, arguments, device):
    """The allocator's own answer is a RuntimeError, or a killed process."""
    most = [MOST - 1 if argument == MANY else argument for argument in arguments]
    with torch.device(device):
        with pytest.raises(ValueError, match=f"{layer.__name__}: .* is larger than any; expected"):
            layer(*most)
        if device == "meta":
            layer(*arguments)
            return
        with pytest.raises(ValueError, match=f"{layer.__name__}: .* GB of memory, and this mach"):
            layer(*arguments)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_a_norm_too_wide_for_the_memory(norm, monkeypatch):
    monkeypatch.setattr("pyllm._memory.memory_bytes", lambda: 10**6)
    norm(10**5)
    with pytest.raises(ValueError, match=f"{norm.__name__}: a width of 1,000,000 takes"):
        norm(10**6)


def test_an_integer_of_numpy_or_a_whole_theta_is_a_number():
    table = RotaryTable(np.int32(8), np.int64(4), 10**300)
    assert table.cos.shape == (8, 2) and table.cos.isfinite().all()


LAYERS = {
    "MLP": (MLP(4, 6, "gelu"), "(..., 4)"),
    "LayerNorm": (LayerNorm(4), "(..., 4)"),
    "MoE": (MoE(4, 6, 2, 1, "gelu"), "(B, T, 4)"),
    "CausalSelfAttention": (CausalSelfAttention(4, 2, 1), "(B, T, 4)"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_input_of_another_shape_or_kind(name):
    layer, shape = LAYERS[name]
    expected = shape.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"{name}: x must have shape {expected}, got \(2, 3, 5\)"):
        layer(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=rf"{name}: x must have shape {expected}, got \(\)"):
        layer(torch.zeros(()))
    with pytest.raises(ValueError, match=f"{name}: x must be a floating-point tensor, got torch.i"):
        layer(torch.zeros(2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=f"{name}: x must be a floating-point tensor, got list"):
        layer([[1.0]])


@pytest.mark.parametrize(
    "table", [RotaryTable(8, 4), LearnedPositions(8, 4), SinusoidalPositions(8, 4)]
)
@pytest.mark.parametrize(("start", "length"), [(7, 2), (0, 9), (8, 1), (2**62, 1)])
def test_positions_outside_the_table(table, start, length):
    """A slice past the end has one row here, which would be added to every token."""
    name = type(table).__name__
    with pytest.raises(ValueError, match=f"{name}: positions {start} to .* between 0 and 8"):
        table(start, length)


@pytest.mark.parametrize(
    "table", [RotaryTable(8, 4), LearnedPositions(8, 4), SinusoidalPositions(8, 4)]
)
@pytest.mark.parametrize(
    ("start", "length", "message"),
    [
        (-1, 1, "start must be a whole number of at least 0, got -1"),
        ("a", 1, "start must be a whole number of at least 0, got 'a'"),
        (0.5, 1, "start must be a whole number of at least 0, got 0.5"),
        (2**70, 1, "start must be a whole number of at least 0, got 1180591620717411303424"),
        (3, -1, "length must be a whole number of at least 0, got -1"),
        (3, None, "length must be a whole number of at least 0, got None"),
    ],
)
def test_positions_that_are_none(table, start, length, message):
    with pytest.raises(ValueError, match=f"{type(table).__name__}: {message}"):
        table(start, length)
