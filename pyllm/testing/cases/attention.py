"""``attention``, declared once."""

import math
from typing import Any

import torch
from torch import Tensor

from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, partly, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    batch, head_dim = sizes["B"], sizes["K"]
    # Scores twice as wide as usual: attention that is nearly uniform hides a wrong scale.
    scale = 2.0 / math.sqrt(head_dim)
    q = draw.normal(batch, sizes["T"], sizes["H"], head_dim)
    k = draw.normal(batch, sizes["S"], sizes["G"], head_dim)
    if "shift" in sizes:
        # One channel adds the same number to every score, which no softmax sees; a backward whose
        # probabilities do not add up to those of the forward does.
        q[..., -1] = k[..., -1] = math.sqrt(sizes["shift"] / scale)
    return {
        "q": q,
        "k": k,
        "v": draw.normal(batch, sizes["S"], sizes["G"], head_dim),
        "scale": scale,
        "causal": sizes["causal"],
        "window": sizes["window"],
        "sinks": sizes.get("sinks", 0),
    }


def _resolve(sizes: Sizes) -> dict[str, Any]:
    """``J`` query heads for each kv head and ``past`` earlier keys to H and S."""
    rest = {axis: size for axis, size in sizes.items() if axis not in ("J", "past")}
    return {"H": sizes["G"] * sizes["J"], "S": sizes["T"] + sizes["past"], **rest}


def _interleaved_heads(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """Query head h reads kv head ``h % G`` instead of ``h // (H / G)``."""
    groups, heads = a["k"].shape[2], a["q"].shape[2]
    at = torch.arange(heads) % groups
    return run({**a, "k": a["k"][:, :, at], "v": a["v"][:, :, at]})


def _swap_keys_and_values(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    return run({**a, "k": a["v"], "v": a["k"]})


def _missing_delta(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """dS without the row sum of dY * Y."""
    dq, dk, _ = run({**a, "y": torch.zeros_like(a["y"])})
    return dq, dk, run(a)[2]


def _first_query_head_only(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """dk and dv of a group miss all but its first query head."""
    share = a["q"].shape[2] // a["k"].shape[2]
    dy = a["dy"].clone()
    dy.unflatten(2, (-1, share))[:, :, :, 1:] = 0
    y = a["y"].clone()
    _, dk, dv = run({**a, "dy": dy, "y": y})
    return run(a)[0], dk, dv


def _window_off_by_one(window: int) -> int:
    return window + 1 if window else 0


def _mask_off_by_one(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """A query sees one key of its future: the mask of the next position."""
    shifted = {**a, "q": torch.cat([a["q"][:, 1:], a["q"][:, -1:]], dim=1)}
    y, lse = run(a)
    y_next, _ = run(shifted)
    return torch.cat([y_next[:, :1], y[:, 1:]], dim=1), lse


def _only_first_keys(k: Tensor) -> Tensor:
    result = k.clone()
    result[:, 512:] = -1e4
    return result


def _shifted_query(q: Tensor) -> Tensor:
    return q.roll(1, dims=1)


MUTANTS = (
    all_zeros("forward"),
    all_zeros("backward"),
    *common("forward", 0, "y"),
    *common("backward", 0, "dq"),
    *common("backward", 1, "dk"),
    *common("backward", 2, "dv"),
    returned("y: last query dropped", "forward", 0, lambda y: drop_last(y, 1)),
    returned("y: last head dropped", "forward", 0, lambda y: drop_last(y, 2)),
    returned("y: last channel dropped", "forward", 0, lambda y: drop_last(y, 3)),
    given("causal mask missing", "forward", "causal", lambda causal: False),
    given("window missing", "forward", "window", lambda window: 0),
    given("window off by one", "forward", "window", _window_off_by_one),
    given("sinks missing", "forward", "sinks", lambda sinks: 0),
    given("sinks off by one", "forward", "sinks", lambda sinks: sinks + 1),
    given("keys far back not seen", "forward", "window", lambda window: window or 300),
    given("keys beyond the first 512 not seen", "forward", "k", _only_first_keys),
    Mutant("causal mask off by one in the first row", "forward", _mask_off_by_one),
    given("scale missing", "forward", "scale", lambda scale: 1.0),
    given("scale squared", "forward", "scale", lambda scale: scale * scale),
    given("queries off by one", "forward", "q", _shifted_query),
    Mutant("keys and values swapped", "forward", _swap_keys_and_values),
    given("value head off by one", "forward", "v", lambda v: v.roll(1, dims=2)),
    Mutant("kv heads interleaved", "forward", _interleaved_heads),
    returned("lse in base 2", "forward", 1, lambda lse: lse / math.log(2)),
    returned("lse: last query dropped", "forward", 1, lambda lse: drop_last(lse, 2)),
    given("backward: causal mask missing", "backward", "causal", lambda causal: False),
    given("backward: window off by one", "backward", "window", _window_off_by_one),
    given("backward: sinks missing", "backward", "sinks", lambda sinks: 0),
    given("backward: lse wrong", "backward", "lse", lambda lse: lse + 0.1),
    partly("dq: scale missing", "backward", 0, "scale", lambda scale: 1.0),
    returned("dk: halved", "backward", 1, lambda dk: dk * 0.5),
    Mutant("dq and dk: delta missing", "backward", _missing_delta),
    Mutant("dk and dv: first query head only", "backward", _first_query_head_only),
    partly("dv: last query not added", "backward", 2, "dy", lambda dy: drop_last(dy, 1)),
    returned("dk: last head dropped", "backward", 1, lambda dk: drop_last(dk, 2)),
)


def _degenerate(sizes: Sizes) -> frozenset[str]:
    if 0 in (sizes["B"], sizes["T"], sizes["S"]):
        return frozenset({"y", "lse", "dq", "dk", "dv"})
    one_key = sizes["S"] == 1 or (sizes["window"] == 1 and not sizes.get("sinks"))
    # The softmax of one number is one whatever the number is: nothing flows to q and k.
    return frozenset({"dq", "dk"} if one_key else ())


def _work(sizes: Sizes, item: int) -> tuple[float, float]:
    tokens, keys = sizes["T"], sizes["S"]
    most = min(keys, sizes["window"] + sizes.get("sinks", 0)) if sizes["window"] else keys
    if sizes["causal"]:
        pairs = sum(min(max(keys - tokens + 1 + t, 0), most) for t in range(tokens))
    else:
        pairs = tokens * keys
    heads = sizes["B"] * sizes["H"]
    moved = tokens * heads + keys * sizes["B"] * sizes["G"]
    return 4.0 * heads * pairs * sizes["K"], item * 2.0 * sizes["K"] * moved


ATTENTION = Operation(
    name="attention",
    inputs=_inputs,
    outputs=(Output("y"), Output("lse", upstream=None)),
    gradients=("q", "k", "v"),
    backward=("dy", "q", "k", "v", "y", "lse", "scale", "causal", "window", "sinks"),
    call=lambda door, a, face: (
        door(
            a["q"],
            a["k"],
            a["v"],
            causal=a["causal"],
            window=a["window"] or None,
            sinks=a["sinks"],
            scale=a["scale"],
            face=face,
        ),
    ),
    door_outputs=("y",),
    axes={
        "T": (1, 2, 3, 7, 16, 17, 33, 64, 65),
        "window": (0, 1, 2, 15, 16, 17, 32),
        "K": (8, 31, 33, 64),
        "G": (1, 2, 3),
        "J": (1, 2, 4, 8),
        "past": (0, 1, 5, 16),
        "sinks": (0, 1, 3, 20),
        "B": (1, 2),
        "causal": (True, False),
    },
    resolve=_resolve,
    extra=(
        {"T": 5, "past": -3, "B": 1, "G": 1, "J": 2, "K": 8, "window": 0, "causal": True},
        {"T": 40, "past": -20, "B": 1, "G": 2, "J": 1, "K": 8, "window": 3, "causal": True},
        {"T": 257, "past": 0, "B": 1, "G": 1, "J": 1, "K": 16, "window": 128, "causal": True},
        {"T": 129, "past": 3, "B": 2, "G": 2, "J": 2, "K": 8, "window": 0, "causal": True},
        {"T": 17, "past": 0, "B": 1, "G": 1, "J": 2, "K": 128, "window": 0, "causal": True},
        {"T": 9, "past": 3, "B": 1, "G": 1, "J": 2, "K": 72, "window": 0, "causal": True},
        # The first query of the second tile sees the last key of the first one, no other sees more.
        {"T": 70, "past": 0, "B": 1, "G": 1, "J": 1, "K": 8, "window": 2, "causal": True},
        {"T": 140, "past": 5, "B": 1, "G": 1, "J": 1, "K": 8, "window": 0, "causal": False},
        {
            "T": 300,
            "past": 9,
            "B": 1,
            "G": 1,
            "J": 2,
            "K": 8,
            "window": 64,
            "causal": True,
            "sinks": 4,
        },
        # Keys beyond what one pass keeps, in lanes of several chunks, and rows in several blocks.
        {"T": 50, "past": 1200, "B": 4, "G": 2, "J": 1, "K": 8, "window": 0, "causal": True},
        {
            "T": 30,
            "past": 1270,
            "B": 4,
            "G": 2,
            "J": 2,
            "K": 8,
            "window": 700,
            "causal": True,
            "sinks": 5,
        },
        *(
            {**sizes, "B": 1, "G": 1, "J": 2, "K": width, "causal": True, "shift": shift}
            for sizes in ({"T": 33, "past": 7, "window": 0}, {"T": 64, "past": 0, "window": 16})
            for width, shift in ((8, 212), (33, 40))
        ),
    ),
    tiny={"T": 4, "past": 0, "B": 1, "G": 1, "J": 2, "K": 4, "window": 0, "causal": True},
    smoke=(
        {"T": 1, "past": 0, "B": 1, "G": 1, "J": 1, "K": 8, "window": 0, "causal": True},
        {"T": 7, "past": 0, "B": 2, "G": 2, "J": 2, "K": 8, "window": 0, "causal": True},
        {"T": 17, "past": 5, "B": 1, "G": 2, "J": 1, "K": 16, "window": 4, "causal": True},
        {
            "T": 17,
            "past": 5,
            "B": 1,
            "G": 1,
            "J": 2,
            "K": 8,
            "window": 4,
            "causal": True,
            "sinks": 2,
        },
        {"T": 9, "past": 3, "B": 2, "G": 1, "J": 3, "K": 12, "window": 0, "causal": False},
        {"T": 5, "past": 2, "B": 1, "G": 1, "J": 1, "K": 8, "window": 1, "causal": False},
        {"T": 3, "past": 600, "B": 1, "G": 1, "J": 1, "K": 4, "window": 0, "causal": True},
        # Nothing to see: no keys at all, and queries before the first key.
        {"T": 0, "past": 0, "B": 1, "G": 1, "J": 2, "K": 8, "window": 0, "causal": True},
        {"T": 3, "past": -3, "B": 1, "G": 1, "J": 2, "K": 8, "window": 0, "causal": False},
    ),
    bench={
        "moe-tiny": {
            "T": 256,
            "past": 0,
            "B": 8,
            "G": 4,
            "J": 1,
            "K": 64,
            "window": 0,
            "causal": True,
        },
        "decode": {
            "T": 1,
            "past": 1023,
            "B": 1,
            "G": 4,
            "J": 2,
            "K": 64,
            "window": 0,
            "causal": True,
        },
    },
    work=_work,
    degenerate=_degenerate,
    mutants=MUTANTS,
    equivalents={
        "broadcasting adds the dimension": (
            "visible: torch.arange(n_keys, device=device).unsqueeze(0) -> "
            "torch.arange(n_keys, device=device)",
        ),
        "a layout, not a number; the door makes results contiguous": (
            "_ungroup: x_BGJTK.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous() -> "
            "x_BGJTK.permute(0, 3, 1, 2, 4).flatten(2, 3)",
            "attention_forward: lse_BGJT.flatten(1, 2).contiguous() -> lse_BGJT.flatten(1, 2)",
            "attention_backward: dk_BGJSK.sum(2).transpose(1, 2).contiguous() -> "
            "dk_BGJSK.sum(2).transpose(1, 2)",
            "attention_backward: dv_BGJSK.sum(2).transpose(1, 2).contiguous() -> "
            "dv_BGJSK.sum(2).transpose(1, 2)",
        ),
        "zero over any number is zero": ("attention_forward: 1.0 -> 2.0",),
        "PyTorch promotes to the wider operand": (
            "attention_backward: (dy_BGJTK @ v_BG1KS).to(wide) -> dy_BGJTK @ v_BG1KS",
            "attention_backward: dy_BTHK.to(wide) -> dy_BTHK",
            "attention_backward: y_BTHK.to(wide) -> y_BTHK",
        ),
    },
)
