"""``rms_norm``, declared once."""

import torch
from torch import Tensor

from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, partly, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    # With a leading B the rows are those of (B, N, D), as a model has them.
    leading = (sizes["B"],) if "B" in sizes else ()
    return {
        "x": draw.normal(*leading, sizes["N"], sizes["D"]),
        "weight": draw.normal(sizes["D"]),
        "eps": 1e-5,
    }


def _sum_of_squares(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    y, rstd = run(a)
    return y / a["x"].shape[-1] ** 0.5, rstd / a["x"].shape[-1] ** 0.5


def _without_projection(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """dx without its second path, the one through the root mean square."""
    wide = a["rstd"].dtype
    dx = a["rstd"].unsqueeze(-1) * a["dy"].to(wide) * a["weight"].to(wide)
    return dx.to(a["x"].dtype), run(a)[1]


MUTANTS = (
    all_zeros("forward"),
    all_zeros("backward"),
    *common("forward", 0, "y"),
    *common("backward", 0, "dx"),
    returned("y: last column dropped", "forward", 0, lambda y: drop_last(y, -1)),
    given("weight left out", "forward", "weight", torch.ones_like),
    given("eps left out", "forward", "eps", lambda eps: 0.0),
    Mutant("sum of squares instead of mean", "forward", _sum_of_squares),
    returned("rstd not inverted", "forward", 1, torch.reciprocal),
    Mutant("dx: path through the mean left out", "backward", _without_projection),
    given("dx: weight left out", "backward", "weight", torch.ones_like),
    given("backward without rstd", "backward", "rstd", torch.ones_like),
    partly("dweight: last row not added", "backward", 1, "dy", lambda dy: drop_last(dy, 0)),
)

RMS_NORM = Operation(
    name="rms_norm",
    inputs=_inputs,
    outputs=(Output("y"), Output("rstd", upstream=None)),
    gradients=("x", "weight"),
    backward=("dy", "x", "weight", "rstd"),
    call=lambda door, a, face: (door(a["x"], a["weight"], a["eps"], face=face),),
    door_outputs=("y",),
    axes={
        "N": (0, 1, 2, 3, 7, 16, 17, 63, 64, 65, 127, 128, 129, 513),
        "D": (1, 31, 33, 97, 100, 511, 1280),
    },
    extra=({"N": 3, "D": 16384}, {"N": 8192, "D": 3}, {"N": 700, "D": 260}),
    tiny={"N": 3, "D": 5},
    smoke=(
        {"N": 0, "D": 4},
        {"N": 1, "D": 1},
        {"N": 5, "D": 33},
        {"N": 17, "D": 100},
        {"B": 2, "N": 3, "D": 7},
        {"N": 3, "D": 5000},  # longer than a Triton program holds at once
    ),
    bench={"moe-tiny": {"N": 8192, "D": 256}, "wide": {"N": 2048, "D": 2048}},
    # x and weight are read, y is written; square, add, two products an element.
    work=lambda s, item: (4.0 * s["N"] * s["D"], item * (2.0 * s["N"] * s["D"] + s["D"])),
    # A row of one element is its own root mean square: only eps keeps dx from zero, and dweight is
    # one sum of numbers with random signs, of which little may be left.
    degenerate=lambda s: (
        frozenset({"dx", "dweight"} if s["D"] == 1 else ())
        | frozenset({"dx", "dweight"} if s["N"] == 0 else ())
    ),
    mutants=MUTANTS,
    equivalents={
        "PyTorch promotes to the wider operand": (
            "rms_norm_forward: weight.to(wide) -> weight",
            "rms_norm_backward: dy.to(wide) -> dy",
            "rms_norm_backward: x.to(wide) -> x",
            "rms_norm_backward: weight.to(wide) -> weight",
        ),
    },
)
