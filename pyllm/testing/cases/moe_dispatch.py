"""``moe_dispatch``, declared once."""

import torch
from torch import Tensor

from pyllm.testing.cases._routing import (
    LOADS,
    N_EXPERTS,
    TOP_K,
    choose_experts,
    resolve_top_k,
)
from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    return {
        "x": draw.normal(sizes["N"], sizes["D"]),
        "experts": choose_experts(sizes, draw),
        "n_experts": sizes["E"],
    }


def _unsorted(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    _, *rest = run(a)
    return a["x"].repeat_interleave(a["experts"].shape[1], dim=0), *rest


def _unstable(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """Rows of one expert in reverse: a sort that is right but not stable."""
    x, order, position, offsets = run(a)
    turned = torch.cat([o.flip(0) for o in order.split(offsets.diff().tolist())])
    position = turned.argsort().view_as(position).to(position.dtype)
    return a["x"][turned.long() // a["experts"].shape[1]], turned, position, offsets


def _first_choice_only(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    rows = a["drows"][a["position"][:, 0].long()]
    return (rows,)


def _transposed(position: Tensor) -> Tensor:
    """The permutation instead of its inverse."""
    return position.reshape(-1).argsort().view_as(position).to(position.dtype)


MUTANTS = (
    all_zeros("forward"),
    all_zeros("backward"),
    *common("forward", 0, "rows"),
    *common("backward", 0, "dx"),
    returned("rows: last column dropped", "forward", 0, lambda t: drop_last(t, -1)),
    Mutant("rows not sorted", "forward", _unsorted),
    Mutant("sort not stable", "forward", _unstable),
    returned("position transposed", "forward", 2, _transposed),
    returned("offsets off by one", "forward", 3, lambda o: o.roll(1)),
    given("expert off by one", "forward", "experts", lambda e: (e - 1).clamp_min(0)),
    Mutant("dx of the first choice only", "backward", _first_choice_only),
    given("dx through the permutation transposed", "backward", "position", _transposed),
)

MOE_DISPATCH = Operation(
    name="moe_dispatch",
    inputs=_inputs,
    outputs=(
        Output("rows"),
        Output("order", upstream=None, exact=True),
        Output("position", upstream=None, exact=True),
        Output("offsets", upstream=None, exact=True),
    ),
    gradients=("x",),
    backward=("drows", "position"),
    call=lambda door, a, face: tuple(door(a["x"], a["experts"], a["n_experts"], face=face)),
    door_outputs=("rows", "order", "position", "offsets"),
    axes={
        "N": (0, 1, 2, 3, 7, 16, 17, 63, 64, 65, 127, 129, 513),
        "D": (1, 31, 33, 97, 100),
        "E": N_EXPERTS,
        "A": TOP_K,
        "load": LOADS,
    },
    resolve=resolve_top_k,
    extra=(
        {"N": 5000, "D": 3, "E": 7, "A": 2, "load": "even"},
        {"N": 30, "D": 300, "E": 64, "A": 8, "load": "even"},
    ),
    tiny={"N": 4, "D": 3, "E": 3, "A": 2, "load": "even"},
    smoke=(
        {"N": 0, "D": 4, "E": 3, "A": 2, "load": "even"},
        {"N": 1, "D": 1, "E": 1, "A": 1, "load": "even"},
        {"N": 17, "D": 33, "E": 7, "A": 2, "load": "even"},
        {"N": 9, "D": 8, "E": 16, "A": 2, "load": "one"},
    ),
    bench={"moe-tiny": {"N": 8192, "D": 256, "E": 8, "A": 2, "load": "even"}},
    work=lambda s, item: (0.0, item * (1.0 + s["A"]) * s["N"] * s["D"]),
    degenerate=lambda s: frozenset({"rows", "dx"} if s["N"] == 0 else ()),
    mutants=MUTANTS,
    equivalents={
        "an int32 index is as good as int64": (
            "moe_dispatch_forward: order_R.long() -> order_R",
            "moe_dispatch_backward: position_NA.long() -> position_NA",
        ),
        "PyTorch adds 16-bit numbers in float32 and rounds once": (
            "moe_dispatch_backward: accumulation_dtype(dx_RD.dtype) -> dx_RD.dtype",
            "moe_dispatch_backward: dx_RD[position_NA.long()].to(wide) -> "
            "dx_RD[position_NA.long()]",
        ),
    },
)
