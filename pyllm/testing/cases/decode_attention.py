"""``decode_attention``, declared once."""

import math
from typing import Any

import torch
from torch import Tensor

from pyllm.testing.cases._cache import draw_positions, off_by_one, slot_of
from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    batch, tokens, head_dim = sizes["B"], sizes["T"], sizes["K"]
    starts, counts = draw_positions(sizes, draw)
    n_positions = sizes["past"] + tokens
    # Scores twice as wide as usual: attention that is nearly uniform hides a wrong scale.
    scale = 2.0 / math.sqrt(head_dim)
    q = draw.normal(batch, tokens, sizes["H"], head_dim)
    history = [draw.normal(batch, n_positions, sizes["G"], head_dim) for _ in range(2)]
    if "shift" in sizes:
        # One channel adds the same number to every score, which no softmax sees; one whose
        # exponentials overflow, or that rounds its scores to 16 bits, does.
        q[..., -1] = history[0][..., -1] = math.sqrt(sizes["shift"] / scale)
    # What no query sees is NaN: memory that was never written, or that is stale.
    shape = (batch, sizes["S"], sizes["G"], head_dim)
    k_cache, v_cache = (history[0].new_full(shape, math.nan) for _ in range(2))
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        for position in _seen(sizes, start, count):
            slot = slot_of(position, sizes)
            k_cache[row, slot] = history[0][row, position]
            v_cache[row, slot] = history[1][row, position]
    return {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "starts": starts,
        "counts": counts,
        "scale": scale,
        "window": sizes["window"],
        "sinks": sizes["sinks"],
        "rolling": sizes["rolling"],
    }


def _seen(sizes: Sizes, start: int, count: int) -> list[int]:
    """The positions that a query of the row sees, one by one."""
    window, sinks = sizes["window"], sizes["sinks"]
    return [
        position
        for position in range(start + count)
        if any(
            position <= at and (not window or position > at - window or position < sinks)
            for at in range(start, start + count)
        )
    ]


def _resolve(sizes: Sizes) -> dict[str, Any]:
    """``J`` query heads for each kv head to H; ``room`` slots more than are needed to S."""
    rest = {axis: size for axis, size in sizes.items() if axis not in ("J", "room", "window")}
    window = sizes["window"] or (3 if sizes["rolling"] else 0)  # a ring without one has no length
    if sizes["rolling"]:
        slots = sizes["sinks"] + window + max(sizes["T"], 1) - 1
    else:
        slots = max(sizes["past"] + sizes["T"], 1)
    heads = sizes["G"] * sizes["J"]
    return {"H": heads, "S": slots + sizes["room"], "window": window, **rest}


def _interleaved_heads(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """Query head h reads kv head ``h % G`` instead of ``h // (H / G)``."""
    at = torch.arange(a["q"].shape[2]) % a["k_cache"].shape[2]
    return run({**a, "k_cache": a["k_cache"][:, :, at], "v_cache": a["v_cache"][:, :, at]})


def _swap_keys_and_values(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    return run({**a, "k_cache": a["v_cache"], "v_cache": a["k_cache"]})


def _sees_its_future(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """Each query sees what the last one sees."""
    parts = []
    for t in range(a["q"].shape[1]):
        (last,) = run({**a, "q": a["q"][:, t : t + 1].expand_as(a["q"])})
        at = (a["counts"].long() - 1).clamp_min(0)
        parts.append(last[torch.arange(len(at)), at] * (t < a["counts"])[:, None, None])
    return (torch.stack(parts, dim=1),)


def _oldest_key_missing(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """A loop over keys that begins one too late."""
    if a["window"] or a["rolling"]:
        return run({**a, "window": max(a["window"] - 1, 1)})
    k_cache = a["k_cache"].clone()
    k_cache[:, 0] = -1e4 * a["q"][:, :1].sum((1, 2)).sign()[:, None]
    return run({**a, "k_cache": k_cache})


def _padding_computed(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    counts = torch.full_like(a["counts"], a["q"].shape[1])
    if not a["rolling"]:
        counts = counts.minimum(a["k_cache"].shape[1] - a["starts"])
    k_cache, v_cache = a["k_cache"].nan_to_num(0.5), a["v_cache"].nan_to_num(0.5)
    return run({**a, "counts": counts, "k_cache": k_cache, "v_cache": v_cache})


def _first_query_only(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    (y,) = run(a)
    y[:, 1:] = 0
    return (y,)


def _without_softmax_shift(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """The chunks of the keys are added up without their maxima: each weighs the same."""
    halves = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        k_cache = a["k_cache"].clone()
        k_cache[:, half] = -1e4 * a["q"].sum((1, 2)).sign()[:, None, None]
        halves.append(run({**a, "k_cache": k_cache})[0])
    return ((halves[0] + halves[1]) / 2,)


MUTANTS = (
    all_zeros("forward"),
    *common("forward", 0, "y"),
    returned("y: last query dropped", "forward", 0, lambda y: drop_last(y, 1)),
    returned("y: last head dropped", "forward", 0, lambda y: drop_last(y, 2)),
    returned("y: last channel dropped", "forward", 0, lambda y: drop_last(y, 3)),
    given("window missing", "forward", "window", lambda window: 0),
    given("window too wide by one", "forward", "window", lambda window: window and window + 1),
    Mutant("oldest key missing", "forward", _oldest_key_missing),
    given("sinks missing", "forward", "sinks", lambda sinks: 0),
    given("one sink too many", "forward", "sinks", lambda sinks: sinks + 1),
    given("does not roll", "forward", "rolling", lambda rolling: False),
    given("starts off by one", "forward", "starts", off_by_one),
    given("starts of another row", "forward", "starts", lambda starts: starts.roll(1)),
    Mutant("the future is seen", "forward", _sees_its_future),
    Mutant("padding computed", "forward", _padding_computed),
    Mutant("first query only", "forward", _first_query_only),
    given("scale missing", "forward", "scale", lambda scale: 1.0),
    given("scale squared", "forward", "scale", lambda scale: scale * scale),
    given("queries off by one", "forward", "q", lambda q: q.roll(1, dims=1)),
    given("value head off by one", "forward", "v_cache", lambda v: v.roll(1, dims=2)),
    Mutant("keys and values swapped", "forward", _swap_keys_and_values),
    Mutant("kv heads interleaved", "forward", _interleaved_heads),
    Mutant("chunks weigh the same", "forward", _without_softmax_shift),
)


def _work(sizes: Sizes, item: int) -> tuple[float, float]:
    rows = sizes["B"] * sizes["T"] * sizes["H"]
    seen = sizes["past"] + (sizes["T"] + 1) / 2
    read = float(sizes["past"] + sizes["T"])
    if sizes["window"]:
        seen = min(seen, sizes["window"] + sizes["sinks"])
        read = min(read, sizes["window"] + sizes["sinks"] + sizes["T"] - 1)
    moved = 2.0 * sizes["B"] * read * sizes["G"] * sizes["K"] + 2.0 * rows * sizes["K"]
    return 4.0 * rows * seen * sizes["K"], item * moved


_SMALL = {"B": 2, "G": 1, "J": 2, "K": 8, "window": 0, "sinks": 0, "room": 1}
_PLAIN = {**_SMALL, "rolling": False, "ragged": False}
_RAGGED = {**_SMALL, "rolling": False, "ragged": True}
_RING = {**_SMALL, "rolling": True, "ragged": False}
_RAGGED_RING = {**_SMALL, "rolling": True, "ragged": True}
_BENCH = {**_PLAIN, "T": 1, "past": 1023, "B": 1, "K": 64, "room": 0}

DECODE_ATTENTION = Operation(
    name="decode_attention",
    inputs=_inputs,
    outputs=(Output("y", upstream=None),),
    gradients=(),
    backward=(),
    call=lambda door, a, face: (
        door(
            a["q"],
            a["k_cache"],
            a["v_cache"],
            a["starts"],
            a["counts"],
            window=a["window"] or None,
            sinks=a["sinks"],
            rolling=a["rolling"],
            scale=a["scale"],
            face=face,
        ),
    ),
    door_outputs=("y",),
    axes={
        "T": (1, 2, 3, 7, 16),
        "past": (0, 1, 5, 16, 40, 100),
        "window": (0, 1, 2, 15, 17, 32),
        "sinks": (0, 1, 4, 17),
        "rolling": (False, True),
        "K": (1, 8, 31, 33, 64),
        "G": (1, 2, 3),
        "J": (1, 2, 4, 8),
        "B": (1, 2, 3),
        "room": (0, 1, 5),
        "ragged": (False, True),
    },
    resolve=_resolve,
    extra=(
        {**_PLAIN, "T": 0, "past": 3},
        {**_RAGGED, "T": 2, "past": 3, "B": 0},
        # Several chunks of keys, cut inside and outside the sinks, before and after the turn.
        {**_PLAIN, "T": 2, "past": 700, "K": 128, "J": 4},
        {**_RAGGED_RING, "T": 3, "past": 900, "K": 64, "G": 2, "J": 8, "window": 300, "sinks": 70},
    ),
    blocks={"PRODUCTS_OF_CHUNK": 1, "KEY_STEP": 3},
    tiny={**_RAGGED_RING, "T": 2, "past": 5, "window": 3, "sinks": 1},
    smoke=(
        {**_PLAIN, "T": 1, "past": 9},
        {**_RAGGED, "T": 3, "past": 7, "B": 4, "G": 2},
        {**_PLAIN, "T": 4, "past": 20, "window": 5, "sinks": 2},
        {**_RING, "T": 3, "past": 17, "window": 6, "K": 33},
        {**_RAGGED_RING, "T": 5, "past": 23, "B": 4, "G": 3, "window": 4, "sinks": 3},
        {**_RING, "T": 2, "past": 0, "window": 2, "sinks": 9},
        {**_PLAIN, "T": 2, "past": 6, "window": 1},
        {**_RAGGED, "T": 3, "past": 9, "shift": 212},
    ),
    bench={
        "decode": {**_BENCH, "G": 8, "J": 1},
        "decode-gqa": {**_BENCH, "G": 2, "J": 4},
        "rolling": {
            **_BENCH,
            "rolling": True,
            "past": 5000,
            "J": 4,
            "G": 2,
            "window": 1024,
            "sinks": 4,
        },
    },
    work=_work,
    degenerate=lambda s: frozenset({"y"} if 0 in (s["B"], s["T"]) else ()),
    mutants=MUTANTS,
    equivalents={
        "a weight of zero times any number": ("decode_attention_forward: 0 -> 1 (2)",),
        "zero over any number is zero": ("decode_attention_forward: 1.0 -> 2.0",),
    },
)
