"""``int8_linear``, declared once."""

import math

import torch
from torch import Tensor

from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    n, d, f = sizes["N"], sizes["D"], sizes["F"]
    # Rows of other sizes, so that a scale of another row is seen.
    x = draw.normal(n, d).double() * (0.5 + 1.5 * draw.uniform(n, 1))
    edge = sizes["edge"]
    if edge == "zero row" and n > 1:
        x[1] = 0.0
    weight = (draw.normal(f, d).double() * 40.0).round().clamp(-128, 127)
    if edge == "extremes":  # sums as large as they get, and pairs of products beyond int16
        x = torch.where(x < 0, -1.0, 1.0) * x.abs().amax(dim=1, keepdim=True)
        weight = torch.where(weight < 0, -128.0, 127.0)
    weight_scale = (0.5 + draw.uniform(f)) / (40.0 * math.sqrt(d))
    if edge == "tiny" and draw.dtype != torch.float16:
        x, weight_scale = x * 2.0**-115, weight_scale * 2.0**115
        # The smallest scale that counts, 2^-126, and one that does not.
        for row, largest in ((1, 127 * 2.0**-126), (2, 100 * 2.0**-126)):
            if row < n:
                x[row] = (x[row] / x[row].abs().amax()).to(torch.bfloat16).double() * largest
    return {
        "x": draw.to(x),
        "weight": weight.to(torch.int8),
        "weight_scale": draw.to(weight_scale, wide=True),
        "quantize_input": sizes["quantize"],
    }


def _one_scale(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """All rows share the scale of the largest."""
    x, largest = a["x"], a["x"].abs().amax()
    wider = torch.cat([x, largest.expand(x.shape[0], 1)], dim=1)
    zeros = a["weight"].new_zeros(a["weight"].shape[0], 1)
    return run({**a, "x": wider, "weight": torch.cat([a["weight"], zeros], dim=1)})


def _saturated(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """vpmaddubsw: weights as unsigned bytes, and two products added in 16 bits."""
    if not a["quantize_input"]:
        return run(a)
    scale = (a["x"].float().abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-30)
    q, w = (a["x"].float() / scale).round(), a["weight"].float() + 128
    pairs = (q.unsqueeze(1) * w).split(2, dim=2)
    sums = sum(pair.sum(2).clamp(-(2.0**15), 2.0**15 - 1) for pair in pairs)
    y = (sums - 128 * q.sum(1, keepdim=True)) * scale * a["weight_scale"]
    return (y.to(a["x"].dtype),)


def _uncompensated(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """Weights as unsigned bytes, and 128 times the sum of the activations is left in."""
    (y,) = run(a)
    return (y + 128 * a["x"].sum(1, keepdim=True) * a["weight_scale"].to(y.dtype),)


def _truncated(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """A conversion to an integer that cuts the fraction off."""
    if not a["quantize_input"]:
        return run(a)
    scale = a["x"].abs().amax(dim=1, keepdim=True) / 127
    cut = (a["x"] / scale.clamp_min(1e-30)).trunc() * scale
    return run({**a, "x": cut, "quantize_input": False})


MUTANTS = (
    all_zeros("forward"),
    *common("forward", 0, "y"),
    returned("y: last feature dropped", "forward", 0, lambda y: drop_last(y, 1)),
    given("last width dropped", "forward", "weight", lambda w: drop_last(w, 1)),
    given("first row's input for all", "forward", "x", lambda x: x[:1].expand_as(x)),
    given("inputs not quantised", "forward", "quantize_input", lambda q: False),
    given("inputs quantised unasked", "forward", "quantize_input", lambda q: True),
    given("weight scales missing", "forward", "weight_scale", torch.ones_like),
    given("weight scale off by one", "forward", "weight_scale", lambda s: s.roll(1)),
    given("one weight scale for all", "forward", "weight_scale", lambda s: s[:1].expand_as(s)),
    given("weights off by one", "forward", "weight", lambda w: w.roll(1, dims=0)),
    given("width off by one", "forward", "weight", lambda w: w.roll(1, dims=1)),
    given("weights without sign", "forward", "weight", lambda w: w.clamp_min(-127).abs()),
    given("-128 is read as 127", "forward", "weight", lambda w: w.clamp(-127, 127)),
    Mutant("one scale for all rows", "forward", _one_scale),
    Mutant("saturated at 16 bits", "forward", _saturated),
    Mutant("compensation missing", "forward", _uncompensated),
    Mutant("truncated, not rounded", "forward", _truncated),
)

_PLAIN = {"edge": "none", "quantize": True}
_BENCH = {"D": 512, "F": 1024, **_PLAIN}

INT8_LINEAR = Operation(
    name="int8_linear",
    inputs=_inputs,
    outputs=(Output("y", upstream=None),),
    gradients=(),
    backward=(),
    call=lambda door, a, face: (
        door(
            a["x"],
            a["weight"],
            a["weight_scale"],
            quantize_input=a["quantize_input"],
            face=face,
        ),
    ),
    door_outputs=("y",),
    axes={
        "N": (0, 1, 2, 3, 5, 6, 7, 13, 16, 17, 65),
        "D": (1, 2, 15, 16, 31, 33, 63, 64, 65, 97, 128, 200),
        "F": (1, 2, 3, 4, 5, 7, 8, 33, 65),
        "edge": ("none", "zero row", "tiny", "extremes"),
        "quantize": (True, False),
    },
    extra=(
        {"N": 7, "D": 4096, "F": 9, "edge": "extremes", "quantize": True},
        {"N": 300, "D": 511, "F": 37, **_PLAIN},
        {"N": 1, "D": 1280, "F": 2051, **_PLAIN},
        {"N": 2, "D": 132_104, "F": 2, "edge": "extremes", "quantize": True},
        {"N": 9, "D": 1280, "F": 130, "edge": "none", "quantize": False},
    ),
    tiny={"N": 3, "D": 5, "F": 2, **_PLAIN},
    smoke=(
        {"N": 0, "D": 4, "F": 3, **_PLAIN},
        {"N": 1, "D": 33, "F": 5, **_PLAIN},
        {"N": 7, "D": 130, "F": 6, "edge": "zero row", "quantize": True},
        {"N": 5, "D": 66, "F": 7, "edge": "extremes", "quantize": True},
        {"N": 3, "D": 20, "F": 4, "edge": "tiny", "quantize": True},
        {"N": 4, "D": 31, "F": 6, "edge": "none", "quantize": False},
    ),
    bench={
        "rows-1": {"N": 1, **_BENCH},
        "rows-8": {"N": 8, **_BENCH},
        "rows-64": {"N": 64, **_BENCH},
    },
    work=lambda s, item: (
        2.0 * s["N"] * s["D"] * s["F"],
        1.0 * s["D"] * s["F"] + item * s["N"] * (s["D"] + s["F"]),
    ),
    degenerate=lambda s: frozenset({"y"} if s["N"] == 0 else ()),
    mutants=MUTANTS,
    equivalents={
        "PyTorch promotes to the wider operand, and nothing is lost by a wider one": (
            "int8_linear_forward: weight_scale_F.to(wide) -> weight_scale_F",
            "int8_linear_forward: scale_N.to(wide) -> scale_N",
            "int8_linear_forward: sum_NF.to(wide) -> sum_NF",
        ),
        "a row as small as that rounds to zero, too": ("quantize_rows: 0.0 -> 1.0",),
        "whole numbers, whatever they are stored in": (
            "quantize_rows: q_ND.nan_to_num(0.0).to(torch.int8) -> q_ND.nan_to_num(0.0)",
        ),
        "any number times a scale that is not finite is not": (
            "quantize_rows: 0.0 -> 1.0 (2)",
            "quantize_rows: q_ND.nan_to_num(0.0) -> q_ND",
        ),
    },
)
