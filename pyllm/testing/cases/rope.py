"""``rope``, declared once."""

import torch
from torch import Tensor

from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    batch, tokens, half = sizes["B"], sizes["T"], sizes["K"] // 2
    shape = (batch, tokens, half) if sizes["ragged"] else (tokens, half)
    # Any angles: true positions would leave the low frequencies nearly unturned.
    angle = draw.uniform(*shape) * 6.28
    return {
        "x": draw.normal(batch, tokens, sizes["H"], 2 * half),
        "cos": draw.to(angle.cos(), wide=True),
        "sin": draw.to(angle.sin(), wide=True),
    }


def _interleaved(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """GPT-J's layout: neighbours are paired."""
    name = "x" if "x" in a else "dy"
    x = a[name]
    (y,) = run({**a, name: torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)})
    first, second = y.chunk(2, dim=-1)
    return (torch.stack([first, second], dim=-1).flatten(-2),)


MUTANTS = (
    all_zeros("forward"),
    all_zeros("backward"),
    *common("forward", 0, "y"),
    *common("backward", 0, "dx"),
    returned("y: last channel dropped", "forward", 0, lambda t: drop_last(t, -1)),
    returned("y: last head dropped", "forward", 0, lambda t: drop_last(t, 2)),
    given("turned the other way", "forward", "sin", torch.neg),
    given("sine missing", "forward", "sin", torch.zeros_like),
    given("cosine missing", "forward", "cos", torch.zeros_like),
    given("position off by one", "forward", "x", lambda x: x.roll(1, dims=1)),
    Mutant("neighbours paired", "forward", _interleaved),
    given("gradient turned forwards", "backward", "sin", torch.neg),
    returned("gradient not turned", "backward", 0, lambda t: t.roll(t.shape[-1] // 2, dims=-1)),
)

ROPE = Operation(
    name="rope",
    inputs=_inputs,
    outputs=(Output("y"),),
    gradients=("x",),
    backward=("dy", "cos", "sin"),
    call=lambda door, a, face: (door(a["x"], a["cos"], a["sin"], face=face),),
    door_outputs=("y",),
    axes={
        "T": (0, 1, 2, 3, 7, 16, 17, 63, 64, 65, 129),
        "K": (2, 6, 32, 62, 66, 128),
        "H": (1, 2, 3, 8),
        "B": (1, 2, 3),
        "ragged": (False, True),
    },
    extra=(
        {"T": 3, "K": 8, "H": 2, "B": 0, "ragged": True},
        {"T": 2100, "K": 4, "H": 2, "B": 1, "ragged": False},
        {"T": 9, "K": 128, "H": 40, "B": 1, "ragged": False},
        {"T": 5, "K": 256, "H": 3, "B": 2, "ragged": True},
    ),
    tiny={"T": 3, "K": 4, "H": 2, "B": 2, "ragged": False},
    smoke=(
        {"T": 0, "K": 4, "H": 1, "B": 1, "ragged": False},
        {"T": 1, "K": 2, "H": 1, "B": 1, "ragged": True},
        {"T": 7, "K": 6, "H": 3, "B": 2, "ragged": True},
        {"T": 9, "K": 32, "H": 2, "B": 2, "ragged": False},
    ),
    bench={"moe-tiny": {"T": 256, "K": 64, "H": 4, "B": 32, "ragged": False}},
    work=lambda s, item: (
        3.0 * s["B"] * s["T"] * s["H"] * s["K"],
        2.0 * item * s["B"] * s["T"] * s["H"] * s["K"],
    ),
    degenerate=lambda s: frozenset({"y", "dx"} if 0 in (s["T"], s["B"]) else ()),
    mutants=MUTANTS,
    equivalents={
        "the tables are wide, and PyTorch promotes to the wider operand": (
            "_turn: accumulation_dtype(x_BTHK.dtype) -> x_BTHK.dtype",
            "_turn: cos.to(wide) -> cos",
            "_turn: sin.to(wide) -> sin",
            "_turn: x_BTHK.to(wide) -> x_BTHK",
        ),
    },
)
