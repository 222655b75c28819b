"""Positions: rotary angles, sinusoids, and the layer norms beside them."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pyllm.layers import (
    LayerNorm,
    LearnedPositions,
    RMSNorm,
    RotaryTable,
    SinusoidalPositions,
)
from pyllm.layers.rope_scaling import rotation
from pyllm.ops import rope


def test_rotary_angles_are_those_of_the_paper():
    cos, sin = RotaryTable(100, 8, theta=500.0)(start=90, length=3)
    for t in range(3):
        for i in range(4):
            angle = (90 + t) * 500.0 ** (-2 * i / 8)
            assert cos[t, i] == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[t, i] == pytest.approx(math.sin(angle), abs=1e-6)


def test_linear_scaling_takes_smaller_steps():
    stretched = RotaryTable(40, 8, 500.0, "linear", 4.0)(start=8, length=1)
    for one, other in zip(stretched, RotaryTable(40, 8, 500.0)(start=2, length=1), strict=True):
        torch.testing.assert_close(one, other)


def test_llama3_scaling_stretches_long_waves_only():
    """Llama 3.1's own settings, plane by plane, in wavelengths as its code has them."""
    cos, sin = RotaryTable(2, 128, 500_000.0, "llama3", 8.0, 8192)(start=1, length=1)
    kinds = set()
    for i in range(64):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            kind, wanted = "kept", frequency
        elif wavelength > 8192:
            kind, wanted = "stretched", frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            kind, wanted = "between", (1 - smooth) * frequency / 8 + smooth * frequency
        kinds.add(kind)
        assert math.atan2(sin[0, i], cos[0, i]) == pytest.approx(wanted, abs=1e-6), i
    assert kinds == {"kept", "stretched", "between"}


def test_yarn_stretches_by_turns_and_sharpens():
    cos, sin = RotaryTable(2, 64, 10_000.0, "yarn", 16.0, 2048)(start=1, length=1)

    def plane(turns):  # arXiv:2309.00071, the inverse of eq. 17
        return 64 * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(10_000.0))

    first, last = math.floor(plane(32)), math.ceil(plane(1))
    assert 0 < first < last < 32
    for i in range(32):
        frequency = 10_000.0 ** (-2 * i / 64)
        ramp = min(max((i - first) / (last - first), 0), 1)
        wanted = frequency * (1 - ramp) + frequency / 16 * ramp
        assert math.atan2(sin[0, i], cos[0, i]) == pytest.approx(wanted, abs=1e-6), i
        size = math.hypot(sin[0, i], cos[0, i])
        assert size == pytest.approx(0.1 * math.log(16) + 1, abs=1e-6)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("scaling", ["linear", "llama3", "yarn"])
def test_wavelengths_are_those_of_transformers(scaling: str, theta: float, head_dim: int):
    settings = {"rope_type": scaling, "rope_theta": theta, "factor": 8.0}
    if scaling != "linear":
        settings |= {"original_max_position_embeddings": 2048}
    if scaling == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=8 * 2048,
        rope_parameters=settings,
    )
    frequency_J, magnitude = ROPE_INIT_FUNCTIONS[scaling](config, torch.device("cpu"))
    got = rotation(head_dim, theta, scaling, 8.0, 2048)
    torch.testing.assert_close(got.frequency_J.float(), frequency_J, rtol=1e-6, atol=0)
    assert got.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": "dynamic"}, "scaling must be one of none, linear, llama3, yarn"),
        (
            {"scaling": "linear", "factor": 0.5},
            "factor must be a finite number of at least 1, got 0.5",
        ),
        ({"scaling": "yarn", "factor": 2.0}, "scaling yarn needs original_len, got None"),
        ({"scaling": "llama3", "factor": 2.0, "original_len": 0}, "original_len must be"),
    ],
)
def test_impossible_scalings_are_value_errors(options, message):
    with pytest.raises(ValueError, match=f"RotaryTable: {message}"):
        RotaryTable(8, 8, **options)


def test_a_rotated_product_depends_on_the_distance_only():
    table = RotaryTable(200, 16)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(at_q, at_k):
        return float((rope(q, *table(at_q, 1)) * rope(k, *table(at_k, 1))).sum())

    assert score(5, 2) == pytest.approx(score(185, 182), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 4), abs=1e-3)


def test_rotary_tables_stay_float32_whatever_the_model_becomes():
    table = RotaryTable(50, 8)
    cos = table.cos.clone()
    for module in (table, torch.nn.Sequential(table)):
        module.to(torch.bfloat16)
        assert table.cos.dtype == table.sin.dtype == torch.float32
        assert torch.equal(table.cos, cos)
    assert not table.state_dict()
    assert table.to("meta").cos.device.type == "meta"


def test_sinusoids_are_those_of_the_paper():
    table = SinusoidalPositions(30, 6)(start=20, length=2)
    for t in range(2):
        for i in range(3):
            angle = (20 + t) / 10_000 ** (2 * i / 6)
            assert table[t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norms_are_what_their_equations_say(dtype):
    x = torch.randn(3, 5, 64).to(dtype)
    rms, layer = RMSNorm(64, eps=1e-3), LayerNorm(64, eps=1e-3)
    with torch.no_grad():
        for parameter in [*rms.parameters(), *layer.parameters()]:
            parameter.normal_()
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * rms.weight
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(rms(x).double(), wanted, rtol=tolerance, atol=tolerance)
    centred = wide - wide.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    wanted = wanted * layer.weight + layer.bias
    torch.testing.assert_close(layer(x).double(), wanted, rtol=tolerance, atol=tolerance)
    assert rms(x).dtype == layer(x).dtype == dtype


TABLES = [RotaryTable(9, 6), LearnedPositions(9, 4), SinusoidalPositions(9, 4)]
KINDS = [type(table).__name__ for table in TABLES]


@pytest.mark.parametrize("table", TABLES, ids=KINDS)
def test_rows_that_stand_at_different_positions(table):
    positions = torch.tensor([[0, 1, 2], [6, 7, 8], [3, 3, 0]])
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.normal_()
        together, whole = table.at(positions), table(0, 9)
    turns = isinstance(together, tuple)
    pairs = zip(together, whole, strict=True) if turns else [(together, whole)]
    for got, values in pairs:
        for row, at in enumerate(positions.tolist()):
            assert torch.equal(got[row], torch.stack([values[position] for position in at]))


@pytest.mark.parametrize("table", TABLES, ids=KINDS)
@pytest.mark.parametrize("position", [-1, 9])
def test_a_position_outside_the_table_is_a_value_error(table, position):
    """An index of -1 would be the last position."""
    message = f"{type(table).__name__}: positions must be between 0 and 8, got values from"
    with pytest.raises(ValueError, match=message):
        table.at(torch.tensor([[0, position]]))
