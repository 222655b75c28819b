"""``moe_ffn``, declared once."""

import torch
from torch import Tensor

from pyllm.testing.cases._routing import (
    LOADS,
    N_EXPERTS,
    TOP_K,
    choose_experts,
    draw_weights,
    resolve_top_k,
)
from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, partly, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    width, hidden, n_experts = sizes["D"], sizes["F"], sizes["E"]
    columns = 2 * hidden if sizes["act"] == "swiglu" else hidden
    # Scaled by 1/sqrt(fan in), so that every tensor on the way is of order one.
    return {
        "x": draw.normal(sizes["N"], width),
        "w_in": draw.normal(n_experts, columns, width, scale=width**-0.5),
        "w_out": draw.normal(n_experts, width, hidden, scale=hidden**-0.5),
        "weights": draw_weights(sizes, draw),
        "experts": choose_experts(sizes, draw),
        "activation": sizes["act"],
    }


def _swap_gate_and_up(w_in: Tensor) -> Tensor:
    gate, up = w_in.tensor_split(2, dim=1)
    return torch.cat([up, gate], dim=1)


def _first_choice(weights: Tensor) -> Tensor:
    result = torch.zeros_like(weights)
    result[:, :1] = weights[:, :1]
    return result


def _uniform(weights: Tensor) -> Tensor:
    return torch.full_like(weights, 1.0 / weights.shape[-1])


def _off_by_one(w: Tensor) -> Tensor:
    return w.roll(1, dims=0)


def _no_activation(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """The hidden rows are the pre-activation itself (its first half where gated)."""
    _, pre, order, position, offsets = run(a)
    top_k, hidden = a["weights"].shape[1], a["w_out"].shape[2]
    y = torch.zeros_like(a["x"])
    for row, slot in enumerate(order.tolist()):
        token, choice = divmod(slot, top_k)
        expert = int(a["experts"][token, choice])
        out = a["w_out"][expert] @ pre[row, :hidden]
        y[token] += a["weights"][token, choice].to(y.dtype) * out
    return y, pre, order, position, offsets


def _expert_counted_twice(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    y, *rest = run(a)
    again, *_ = run({**a, "weights": _first_choice(a["weights"])})
    return y + again, *rest


def _transposed(position: Tensor) -> Tensor:
    return position.reshape(-1).argsort().view_as(position).to(position.dtype)


def _half_gate(dw_in: Tensor) -> Tensor:
    """The gradient of the second half of the rows (up, where gated) left out."""
    result = dw_in.clone()
    result[:, result.shape[1] // 2 :] = 0
    return result


MUTANTS = (
    all_zeros("forward"),
    all_zeros("backward"),
    *common("forward", 0, "y"),
    *common("backward", 0, "dx"),
    *common("backward", 1, "dw_in"),
    *common("backward", 2, "dw_out"),
    *common("backward", 3, "dweights"),
    returned("y: last column dropped", "forward", 0, lambda t: drop_last(t, -1)),
    returned("pre: last column dropped", "forward", 1, lambda t: drop_last(t, -1)),
    given("gate and up swapped", "forward", "w_in", _swap_gate_and_up),
    given("first expert only", "forward", "weights", _first_choice),
    given("weights uniform", "forward", "weights", _uniform),
    given("weights left out", "forward", "weights", torch.ones_like),
    given("weights in another order", "forward", "weights", lambda w: w.flip(-1)),
    given("w_in of the next expert", "forward", "w_in", _off_by_one),
    given("w_out of the next expert", "forward", "w_out", _off_by_one),
    given("hidden column dropped", "forward", "w_out", lambda w: drop_last(w, -1)),
    given("input column dropped", "forward", "x", lambda x: drop_last(x, -1)),
    Mutant("activation left out", "forward", _no_activation),
    Mutant("an expert counted twice", "forward", _expert_counted_twice),
    returned("order transposed", "forward", 2, _transposed),
    returned("position transposed", "forward", 3, _transposed),
    returned("offsets off by one", "forward", 4, lambda o: o.roll(1)),
    partly("dx: first choice only", "backward", 0, "weights", _first_choice),
    partly("dx: permutation transposed", "backward", 0, "position", _transposed),
    partly("dx: weights left out", "backward", 0, "weights", torch.ones_like),
    partly("dw_in: weights left out", "backward", 1, "weights", torch.ones_like),
    partly("dw_in: next expert", "backward", 1, "w_out", _off_by_one),
    returned("dw_in: half missing", "backward", 1, _half_gate),
    partly("dw_in: last row not added", "backward", 1, "dy", lambda t: drop_last(t, 0)),
    partly("dw_out: weights left out", "backward", 2, "weights", torch.ones_like),
    partly("dw_out: last row not added", "backward", 2, "dy", lambda t: drop_last(t, 0)),
    partly("dw_out: pre-activation wrong", "backward", 2, "pre", torch.zeros_like),
    partly("dweights: last column left out", "backward", 3, "dy", lambda t: drop_last(t, -1)),
    returned("dweights: choices swapped", "backward", 3, lambda t: t.flip(-1)),
    returned("dweights missing", "backward", 3, torch.zeros_like),
)


def _degenerate(sizes: Sizes) -> frozenset[str]:
    if sizes["N"] == 0:
        return frozenset({"y", "pre", "dx", "dw_in", "dw_out", "dweights"})
    return frozenset()


def _work(sizes: Sizes, item: int) -> tuple[float, float]:
    rows = sizes["N"] * sizes["A"]
    columns = sizes["F"] * (2 if sizes["act"] == "swiglu" else 1)
    flops = 2.0 * rows * sizes["D"] * (columns + sizes["F"])
    weights = sizes["E"] * sizes["D"] * (columns + sizes["F"])
    return flops, item * (weights + 2.0 * sizes["N"] * sizes["D"] + rows * columns)


MOE_FFN = Operation(
    name="moe_ffn",
    inputs=_inputs,
    outputs=(
        Output("y"),
        Output("pre", upstream=None),
        Output("order", upstream=None, exact=True),
        Output("position", upstream=None, exact=True),
        Output("offsets", upstream=None, exact=True),
    ),
    gradients=("x", "w_in", "w_out", "weights"),
    backward=(
        "dy",
        "x",
        "w_in",
        "w_out",
        "weights",
        "pre",
        "order",
        "position",
        "offsets",
        "activation",
    ),
    call=lambda door, a, face: (door(*a.values(), face=face),),
    door_outputs=("y",),
    axes={
        "N": (0, 1, 2, 3, 7, 16, 17, 63, 65, 128, 129),
        "D": (8, 31, 33, 97, 100),
        "F": (8, 31, 33, 100),
        "E": N_EXPERTS,
        "A": TOP_K,
        "load": LOADS,
        "act": ("swiglu", "gelu"),
    },
    resolve=resolve_top_k,
    extra=(
        {"N": 5, "D": 1280, "F": 511, "E": 2, "A": 2, "load": "even", "act": "swiglu"},
        {"N": 513, "D": 64, "F": 97, "E": 7, "A": 2, "load": "even", "act": "gelu"},
        {"N": 2100, "D": 8, "F": 9, "E": 3, "A": 2, "load": "last", "act": "swiglu"},
        {"N": 200, "D": 16, "F": 12, "E": 64, "A": 8, "load": "even", "act": "swiglu"},
        # Few tokens: more choices and experts than a warp has lanes, and ragged rows.
        {"N": 3, "D": 64, "F": 40, "E": 40, "A": 12, "load": "even", "act": "swiglu"},
        {"N": 4, "D": 33, "F": 21, "E": 3, "A": 2, "load": "even", "act": "swiglu"},
    ),
    blocks={"GROUP_BYTES": 1},
    tiny={"N": 4, "D": 3, "F": 2, "E": 3, "A": 2, "load": "even", "act": "swiglu"},
    smoke=(
        {"N": 0, "D": 4, "F": 6, "E": 3, "A": 2, "load": "even", "act": "swiglu"},
        {"N": 1, "D": 8, "F": 5, "E": 1, "A": 1, "load": "even", "act": "gelu"},
        {"N": 17, "D": 33, "F": 20, "E": 7, "A": 2, "load": "even", "act": "swiglu"},
        {"N": 9, "D": 16, "F": 7, "E": 5, "A": 2, "load": "even", "act": "gelu"},
        {"N": 6, "D": 16, "F": 8, "E": 4, "A": 2, "load": "last", "act": "swiglu"},
    ),
    bench={
        "moe-tiny": {
            "N": 2048,
            "D": 256,
            "F": 384,
            "E": 8,
            "A": 2,
            "load": "even",
            "act": "swiglu",
        },
        "moe-158m": {
            "N": 512,
            "D": 512,
            "F": 864,
            "E": 16,
            "A": 2,
            "load": "even",
            "act": "swiglu",
        },
    },
    work=_work,
    degenerate=_degenerate,
    mutants=MUTANTS,
    equivalents={
        "an int32 index is as good as int64, a tensor as good as a list": (
            "moe_ffn_forward: order_R.long() -> order_R",
            "moe_ffn_forward: offsets_E1.tolist() -> offsets_E1",
            "moe_ffn_backward: order_R.long() -> order_R",
            "moe_ffn_backward: offsets_E1.tolist() -> offsets_E1",
            "moe_ffn_backward: position_NA.long() -> position_NA",
        ),
        "an expert's rows are read before they are written over": (
            "moe_ffn_forward: torch.empty_like(x_RD) -> x_RD",
            "moe_ffn_backward: torch.empty_like(x_RD) -> x_RD",
        ),
        "what is left of it in 16 bits is within one rounding": (
            "moe_ffn_backward: dh_unweighted.to(w_R1.dtype) -> dh_unweighted",
        ),
    },
)
