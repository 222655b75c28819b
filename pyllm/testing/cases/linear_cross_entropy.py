"""``linear_cross_entropy``, declared once."""

import torch
from torch import Tensor

from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, partly, returned

_IGNORE = -100
_OTHER_IGNORE = 2


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    rows, width, vocabulary = sizes["N"], sizes["D"], sizes["V"]
    targets = draw.integers(vocabulary, rows)
    ignore_index = _OTHER_IGNORE if sizes["ignored"] == "a word" else _IGNORE
    if sizes["ignored"] in ("some", "a word"):
        targets[1::3] = ignore_index
    elif sizes["ignored"] == "all":
        targets.fill_(ignore_index)
    x = draw.normal(rows, width)
    weight = draw.normal(vocabulary, width, scale=width**-0.5)
    if sizes.get("shift"):
        # The same large number on every logit changes no loss, but e^logit is infinite.
        x[:, 0], weight[:, 0] = 1.0, 100.0
    return {"x": x, "weight": weight, "targets": targets, "ignore_index": ignore_index}


def _only_first_words(weight: Tensor) -> Tensor:
    result = weight.clone()
    result[2048:] = 0
    return result


def _next_word(targets: Tensor) -> Tensor:
    return (targets - 1).clamp_min(0).where(targets != _IGNORE, _IGNORE)


def _mean_of_rows(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    loss, lse = run(a)
    return (loss / max(loss.numel(), 1)).expand_as(loss).clone(), lse


MUTANTS = (
    all_zeros("forward"),
    all_zeros("backward"),
    *common("forward", 0, "loss"),
    *common("backward", 0, "dx"),
    *common("backward", 1, "dweight"),
    given("target off by one", "forward", "targets", _next_word),
    given("ignored rows counted", "forward", "targets", lambda t: t.clamp_min(0)),
    given("last word left out", "forward", "weight", lambda w: drop_last(w, 0)),
    given("words after 2,048 left out", "forward", "weight", _only_first_words),
    given("last channel left out", "forward", "x", lambda x: drop_last(x, -1)),
    returned("loss with the wrong sign", "forward", 0, torch.neg),
    Mutant("loss divided by the rows", "forward", _mean_of_rows),
    returned("lse in base 2", "forward", 1, lambda lse: lse * 1.4427),
    given("backward: target off by one", "backward", "targets", _next_word),
    given("backward: ignored rows counted", "backward", "targets", lambda t: t.clamp_min(0)),
    given("backward: upstream gradient ignored", "backward", "dloss", torch.ones_like),
    given("backward: lse wrong", "backward", "lse", lambda lse: lse + 0.1),
    given("backward: all rows ignored", "backward", "targets", lambda t: t * 0 + _IGNORE),
    partly("dweight: last row not added", "backward", 1, "dloss", lambda d: drop_last(d, 0)),
    partly("dx: last word left out", "backward", 0, "weight", lambda w: drop_last(w, 0)),
)


def _degenerate(sizes: Sizes) -> frozenset[str]:
    if sizes["N"] == 0:
        return frozenset({"loss", "lse", "dx", "dweight"})
    # One word is always right; a row that does not count has no loss.
    nothing = sizes["V"] == 1 or sizes["ignored"] == "all"
    return frozenset({"loss", "dx", "dweight"} if nothing else ())


LINEAR_CROSS_ENTROPY = Operation(
    name="linear_cross_entropy",
    inputs=_inputs,
    outputs=(Output("loss"), Output("lse", upstream=None)),
    gradients=("x", "weight"),
    backward=("dloss", "x", "weight", "targets", "lse", "ignore_index"),
    call=lambda door, a, face: (
        door(
            a["x"],
            a["weight"],
            a["targets"],
            ignore_index=a["ignore_index"],
            reduction="none",
            face=face,
        ),
    ),
    door_outputs=("loss",),
    axes={
        "N": (0, 1, 2, 3, 7, 16, 17, 63, 64, 65, 129, 513),
        "D": (1, 31, 33, 100),
        "V": (1, 2, 31, 97, 511, 1280),
        "ignored": ("none", "some", "all"),
    },
    extra=(
        {"N": 1030, "D": 8, "V": 16, "ignored": "some"},
        {"N": 7, "D": 300, "V": 40, "ignored": "some"},
        {"N": 3, "D": 4, "V": 50_257, "ignored": "none"},
    ),
    blocks={"CHUNK": 16, "BLOCK_BYTES": 1},
    tiny={"N": 4, "D": 3, "V": 5, "ignored": "some"},
    smoke=(
        {"N": 0, "D": 4, "V": 8, "ignored": "none"},
        {"N": 1, "D": 1, "V": 1, "ignored": "none"},
        {"N": 17, "D": 33, "V": 40, "ignored": "some"},
        {"N": 9, "D": 8, "V": 31, "ignored": "none"},
        {"N": 515, "D": 3, "V": 5, "ignored": "some"},  # more than one chunk
        {"N": 3, "D": 5, "V": 1, "ignored": "some"},
        {"N": 9, "D": 8, "V": 31, "ignored": "a word"},
        {"N": 5, "D": 4, "V": 5003, "ignored": "none"},
        {"N": 5, "D": 4, "V": 7, "ignored": "none", "shift": True},
    ),
    bench={"moe-tiny": {"N": 2048, "D": 256, "V": 4096, "ignored": "none"}},
    work=lambda s, item: (
        2.0 * s["N"] * s["D"] * s["V"],
        item * (s["N"] * s["D"] + s["V"] * s["D"]) + 16.0 * s["N"],
    ),
    degenerate=_degenerate,
    mutants=MUTANTS,
    equivalents={
        "any chunk size gives the same": ("CHUNK: 512 -> 513", "CHUNK: 512 -> 511"),
        "the logits' gradient is rounded to 16 bits at the end all the same": (
            "linear_cross_entropy_backward: (x_ND[rows].to(product) @ weight_VD.t().to(product))"
            ".to(wide) -> x_ND[rows].to(product) @ weight_VD.t().to(product)",
        ),
    },
)
