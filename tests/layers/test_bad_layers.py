"""Layers refuse sizes that cannot work, and inputs of another width."""

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

SIZE = "must be a whole number of at least 1, got"


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
        (RMSNorm, (4, -1.0), "RMSNorm: eps must be a positive number, got -1.0"),
        (LayerNorm, (4, float("nan")), "LayerNorm: eps must be a positive number, got nan"),
        (LayerNorm, (4, True), "LayerNorm: eps must be a positive number, got True"),
        (RotaryTable, (8, 3), "RotaryTable: head_dim must be even, got 3"),
        (RotaryTable, (0, 4), f"RotaryTable: max_seq_len {SIZE} 0"),
        (RotaryTable, (8, 4, 0.0), "RotaryTable: theta must be a number of at least 1, got 0.0"),
        (RotaryTable, (8, 4, "10"), "RotaryTable: theta must be a number of at least 1, got '10'"),
        (LearnedPositions, (8, 0), f"LearnedPositions: width {SIZE} 0"),
        (SinusoidalPositions, (-8, 4), f"SinusoidalPositions: max_seq_len {SIZE} -8"),
    ],
)
def test_impossible_sizes(layer, arguments, message):
    with pytest.raises(ValueError, match=message):
        layer(*arguments)


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
@pytest.mark.parametrize(("start", "length"), [(7, 2), (-1, 1), (0, 9), (3, -1)])
def test_positions_outside_the_table(table, start, length):
    """A slice past the end has one row here, which would be added to every token."""
    name = type(table).__name__
    with pytest.raises(ValueError, match=f"{name}: positions {start} to .* between 0 and 8"):
        table(start, length)
