"""``route_topk``, declared once."""

import torch
from torch import Tensor

from pyllm.testing.cases._routing import N_EXPERTS, TOP_K, resolve_top_k
from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, given, partly, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    # Levels far apart in random order: no two logits of a row tie in any dtype, so that the
    # experts can be compared exactly. The shift of each row keeps the log-sum-exp from repeating.
    rows, n_experts = sizes["N"], sizes["E"]
    levels = draw.uniform(rows, n_experts).argsort(-1).double()
    jitter = draw.uniform(rows, n_experts) * (1.0 / n_experts)
    if sizes.get("ties"):  # every level twice: the lower index must come first
        levels, jitter = levels.div(2).floor() * 2, torch.zeros_like(jitter)
    levels = levels * (4.0 / n_experts) - 2.0
    shift = draw.uniform(rows, 1) * 2 - 1
    logits = draw.to(levels + jitter + shift)
    bias = None
    if sizes.get("bias"):  # as large as the probabilities, so that it decides about as often
        bias = draw.to(draw.uniform(n_experts) / n_experts, wide=True)
    return {"logits": logits, "bias": bias, "top_k": sizes["A"]}


def _rows(sizes: Sizes) -> float:
    return float(max(sizes["N"], 1))


def _uniform_weights(weights: Tensor) -> Tensor:
    return torch.full_like(weights, 1.0 / max(weights.shape[-1], 1))


def _not_renormalised(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    weights, experts, *rest = run(a)
    logits = a["logits"].to(weights.dtype)
    return logits.softmax(-1).gather(1, experts.long()), experts, *rest


def _smallest(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    _, experts, *_ = run(a)
    weights, _, *rest = run({**a, "logits": -a["logits"]})
    return weights, experts, *rest


def _bias_in_weights(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    weights, experts, *rest = run(a)
    if a["bias"] is not None:
        scores = (a["logits"].to(weights.dtype).softmax(-1) + a["bias"]).gather(1, experts.long())
        weights = scores / scores.sum(-1, keepdim=True)
    return weights, experts, *rest


def _no_inner_product(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """dlogits without the ``sum_b dw_b w_b`` of the softmax over the chosen."""
    (dlogits,) = run(a)
    inner = (a["dweights"] * a["weights"]).sum(-1, keepdim=True)
    extra = torch.zeros_like(dlogits, dtype=inner.dtype)
    extra.scatter_add_(1, a["experts"].long(), a["weights"] * inner)
    return ((dlogits + extra).to(dlogits.dtype),)


MUTANTS = (
    all_zeros("forward"),
    all_zeros("backward"),
    *common("forward", 0, "weights"),
    *common("backward", 0, "dlogits"),
    returned("weights uniform", "forward", 0, _uniform_weights),
    Mutant("weights not renormalised", "forward", _not_renormalised),
    returned("weights in another order than experts", "forward", 0, lambda w: w.flip(-1)),
    returned("experts in another order", "forward", 1, lambda e: e.flip(-1)),
    returned("expert off by one", "forward", 1, lambda e: e + 1),
    Mutant("weights of the smallest", "forward", _smallest),
    given("bias forgotten", "forward", "bias", lambda bias: None),
    given("bias taken off", "forward", "bias", lambda bias: None if bias is None else -bias),
    Mutant("bias in the weights", "forward", _bias_in_weights),
    returned("balance loss without E", "forward", 2, lambda loss: loss / 7),
    returned("balance loss without 1/A", "forward", 2, lambda loss: loss * 2),
    partly("z-loss of the first rows only", "forward", 3, "logits", lambda z: z[:-1]),
    returned("z-loss not squared", "forward", 3, torch.sqrt),
    returned("a count missing", "forward", 4, lambda c: c - (c == c.max()).to(c.dtype)),
    given("weight gradient missing", "backward", "dweights", torch.zeros_like),
    given("balance gradient missing", "backward", "dbalance_loss", torch.zeros_like),
    given("z gradient missing", "backward", "dz_loss", torch.zeros_like),
    given("z gradient without 2", "backward", "dz_loss", lambda d: d / 2),
    given("backward of the first expert only", "backward", "weights", lambda w: _first_only(w)),
    Mutant("weight gradient without inner product", "backward", _no_inner_product),
    given("counts forgotten in the backward", "backward", "tokens_per_expert", torch.ones_like),
)


def _first_only(weights: Tensor) -> Tensor:
    result = torch.zeros_like(weights)
    result[:, :1] = weights[:, :1]
    return result


ROUTE_TOPK = Operation(
    name="route_topk",
    inputs=_inputs,
    outputs=(
        Output("weights"),
        Output("experts", upstream=None, exact=True),
        Output("balance_loss", upstream=_rows),
        Output("z_loss", upstream=_rows),
        Output("tokens_per_expert", upstream=None, exact=True),
    ),
    gradients=("logits",),
    backward=(
        "dweights",
        "dbalance_loss",
        "dz_loss",
        "logits",
        "weights",
        "experts",
        "tokens_per_expert",
    ),
    call=lambda door, a, face: tuple(door(a["logits"], a["top_k"], bias=a["bias"], face=face)),
    door_outputs=("weights", "experts", "balance_loss", "z_loss", "tokens_per_expert"),
    axes={
        "N": (0, 1, 2, 3, 7, 16, 17, 63, 64, 65, 127, 128, 129, 513),
        "E": N_EXPERTS,
        "A": TOP_K,
    },
    resolve=resolve_top_k,
    extra=(
        {"N": 8192, "E": 16, "A": 2},
        {"N": 65, "E": 33, "A": 7, "ties": True},
        {"N": 129, "E": 16, "A": "E", "ties": True},
        {"N": 65, "E": 256, "A": 8},
        {"N": 513, "E": 16, "A": 2, "bias": True},
        {"N": 65, "E": 33, "A": 7, "bias": True},
    ),
    tiny={"N": 5, "E": 4, "A": 2},
    smoke=(
        {"N": 0, "E": 4, "A": 2},
        {"N": 1, "E": 1, "A": 1},
        {"N": 9, "E": 7, "A": 2},
        {"N": 17, "E": 16, "A": "E"},
        {"N": 9, "E": 7, "A": 3, "ties": True},
        {"N": 17, "E": 7, "A": 2, "bias": True},
    ),
    bench={"moe-tiny": {"N": 8192, "E": 8, "A": 2}, "moe-158m": {"N": 4096, "E": 16, "A": 2}},
    work=lambda s, item: (
        5.0 * s["N"] * s["E"],
        item * s["N"] * s["E"] + 8.0 * s["N"] * s["A"],
    ),
    degenerate=lambda s: (
        frozenset({"weights", "balance_loss", "z_loss", "dlogits"}) if s["N"] == 0 else frozenset()
    ),
    mutants=MUTANTS,
    equivalents={
        "the sum over all that follows takes the rows too": (
            "route_topk_forward: p_NE.sum(0) -> p_NE",
        ),
        "an int32 index is as good as int64": (
            "route_topk_backward: experts_NA.long() -> experts_NA",
        ),
    },
)
