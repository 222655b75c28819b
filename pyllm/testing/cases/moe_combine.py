"""``moe_combine``, declared once."""

import torch
from torch import Tensor

from pyllm.testing.cases._routing import draw_position, draw_weights
from pyllm.testing.declaration import Arguments, Draw, Operation, Output, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, partly, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    return {
        "rows": draw.normal(sizes["N"] * sizes["A"], sizes["D"]),
        "weights": draw_weights(sizes, draw),
        "position": draw_position(sizes, draw),
    }


def _first_choice(weights: Tensor) -> Tensor:
    result = torch.zeros_like(weights)
    result[:, :1] = weights[:, :1]
    return result


def _transposed(position: Tensor) -> Tensor:
    return position.reshape(-1).argsort().view_as(position).to(position.dtype)


def _uniform(weights: Tensor) -> Tensor:
    return torch.full_like(weights, 1.0 / weights.shape[-1])


MUTANTS = (
    all_zeros("forward"),
    all_zeros("backward"),
    *common("forward", 0, "y"),
    *common("backward", 0, "drows"),
    *common("backward", 1, "dweights"),
    returned("y: last column dropped", "forward", 0, lambda t: drop_last(t, -1)),
    given("weights left out", "forward", "weights", torch.ones_like),
    given("weights uniform", "forward", "weights", _uniform),
    given("first choice only", "forward", "weights", _first_choice),
    given("weights in another order", "forward", "weights", lambda w: w.flip(-1)),
    given("permutation transposed", "forward", "position", _transposed),
    given("drows: weights left out", "backward", "weights", torch.ones_like),
    partly("drows: permutation transposed", "backward", 0, "position", _transposed),
    partly("dweights: permutation transposed", "backward", 1, "position", _transposed),
    partly("dweights: last column left out", "backward", 1, "dy", lambda t: drop_last(t, -1)),
)

MOE_COMBINE = Operation(
    name="moe_combine",
    inputs=_inputs,
    outputs=(Output("y"),),
    gradients=("rows", "weights"),
    backward=("dy", "rows", "weights", "position"),
    call=lambda door, a, face: (door(a["rows"], a["weights"], a["position"], face=face),),
    door_outputs=("y",),
    axes={
        "N": (0, 1, 2, 3, 7, 16, 17, 63, 64, 65, 127, 129, 513),
        "D": (1, 31, 33, 97, 100, 1280),
        "A": (1, 2, 3, 16),
    },
    extra=({"N": 5000, "D": 3, "A": 2}, {"N": 30, "D": 300, "A": 8}),
    tiny={"N": 4, "D": 3, "A": 2},
    smoke=(
        {"N": 0, "D": 4, "A": 2},
        {"N": 1, "D": 1, "A": 1},
        {"N": 9, "D": 33, "A": 2},
        {"N": 17, "D": 8, "A": 3},
    ),
    bench={"moe-tiny": {"N": 8192, "D": 256, "A": 2}},
    work=lambda s, item: (
        2.0 * s["N"] * s["A"] * s["D"],
        item * (1.0 + s["A"]) * s["N"] * s["D"] + 8.0 * s["N"] * s["A"],
    ),
    degenerate=lambda s: frozenset({"y", "drows", "dweights"} if s["N"] == 0 else ()),
    mutants=MUTANTS,
    equivalents={
        "an int32 index is as good as int64": (
            "moe_combine_forward: position_NA.long() -> position_NA",
            "moe_combine_backward: position_NA.reshape(-1).long() -> position_NA.reshape(-1)",
            "moe_combine_backward: position_NA.long() -> position_NA",
        ),
        "PyTorch promotes to the wider operand, the routing weights": (
            "moe_combine_forward: y_RD[position_NA.long()].to(wide) -> y_RD[position_NA.long()]",
            "moe_combine_forward: weights_NA.to(wide) -> weights_NA",
            "moe_combine_backward: dy_ND.to(wide) -> dy_ND",
            "moe_combine_backward: weights_NA.to(wide) -> weights_NA",
            "moe_combine_backward: y_RD[position_NA.long()].to(wide) -> y_RD[position_NA.long()]",
        ),
        "the weights have the wide dtype already": (
            "moe_combine_backward: dweights_NA.to(weights_NA.dtype) -> dweights_NA",
        ),
    },
)
