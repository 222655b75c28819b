"""``decode_attention``, declared once."""

import math
from typing import Any

import torch
from torch import Tensor

from pyllm.testing.cases._cache import (
    draw_int8,
    draw_positions,
    of_int8,
    off_by_one,
    slot_of,
)
from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, returned

HELD = ("k_cache", "v_cache", "k_scales", "v_scales")


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    batch, tokens, head_dim = sizes["B"], sizes["T"], sizes["K"]
    starts, counts = draw_positions(sizes, draw)
    n_positions = sizes["past"] + tokens
    # Scores twice as wide as usual: attention that is nearly uniform hides a wrong scale.
    scale = 2.0 / math.sqrt(head_dim)
    q = draw.normal(batch, tokens, sizes["H"], head_dim)
    of_history = (batch, n_positions, sizes["G"], head_dim)
    shape = (batch, sizes["S"], sizes["G"], head_dim)
    k_scales = v_scales = None
    # What no query sees is NaN: memory that was never written, or that is stale.
    if sizes["int8"]:
        drawn = [draw_int8(draw, *of_history) for _ in range(2)]
        history, scales = (list(pair) for pair in zip(*drawn, strict=True))
        k_cache, v_cache = (history[0].new_full(shape, 77) for _ in range(2))
        k_scales, v_scales = (scales[0].new_full(shape[:3], math.nan) for _ in range(2))
    else:
        history = [draw.normal(*of_history) for _ in range(2)]
        k_cache, v_cache = (history[0].new_full(shape, math.nan) for _ in range(2))
    if "shift" in sizes:
        # One channel adds the same number to every score, which no softmax sees; one whose
        # exponentials overflow, or that rounds its scores to 16 bits, does.
        q[..., -1] = history[0][..., -1] = math.sqrt(sizes["shift"] / scale)
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        for position in _seen(sizes, start, count):
            slot = slot_of(position, sizes)
            k_cache[row, slot] = history[0][row, position]
            v_cache[row, slot] = history[1][row, position]
            if k_scales is not None and v_scales is not None:
                k_scales[row, slot] = scales[0][row, position]
                v_scales[row, slot] = scales[1][row, position]
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
        "k_scales": k_scales,
        "v_scales": v_scales,
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
    held = {name: a[name] for name in HELD if a[name] is not None}
    return run({**a, **{name: tensor[:, :, at] for name, tensor in held.items()}})


def _swap_keys_and_values(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    return run({**a, "k_cache": a["v_cache"], "v_cache": a["k_cache"], **_swapped_scales(a)})


def _swapped_scales(a: Arguments) -> Arguments:
    return {"k_scales": a["v_scales"], "v_scales": a["k_scales"]}


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
    if a["k_scales"] is not None:  # no integer is that large
        return run(a)
    k_cache = a["k_cache"].clone()
    k_cache[:, 0] = -1e4 * a["q"][:, :1].sum((1, 2)).sign()[:, None]
    return run({**a, "k_cache": k_cache})


def _padding_computed(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    counts = torch.full_like(a["counts"], a["q"].shape[1])
    if not a["rolling"]:
        counts = counts.minimum(a["k_cache"].shape[1] - a["starts"])
    held = {name: a[name].nan_to_num(0.5) for name in HELD if a[name] is not None}
    return run({**a, "counts": counts, **held})


def _first_query_only(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    (y,) = run(a)
    y[:, 1:] = 0
    return (y,)


def _without_softmax_shift(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """The chunks of the keys are added up without their maxima: each weighs the same."""
    if a["k_scales"] is not None:  # no integer is that small
        return run(a)
    halves = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        k_cache = a["k_cache"].clone()
        k_cache[:, half] = -1e4 * a["q"].sum((1, 2)).sign()[:, None, None]
        halves.append(run({**a, "k_cache": k_cache})[0])
    return ((halves[0] + halves[1]) / 2,)


INT8_MUTANTS = (
    given("key scales left out", "forward", "k_scales", torch.ones_like),
    given("value scales left out", "forward", "v_scales", torch.ones_like),
    given("key scales applied twice", "forward", "k_scales", torch.square),
    given("value scales applied twice", "forward", "v_scales", torch.square),
    given("key scales of the next head", "forward", "k_scales", lambda s: s.roll(1, dims=2)),
    given("value scales of the next head", "forward", "v_scales", lambda s: s.roll(1, dims=2)),
    given("key scales of the next slot", "forward", "k_scales", lambda s: s.roll(1, dims=1)),
    given("value scales of the next slot", "forward", "v_scales", lambda s: s.roll(1, dims=1)),
    given("key scales of the next row", "forward", "k_scales", lambda s: s.roll(1, dims=0)),
    given("one scale for all heads", "forward", "v_scales", lambda s: s[:, :, :1].expand_as(s)),
    given("key scales in bfloat16", "forward", "k_scales", lambda s: s.bfloat16().to(s.dtype)),
    given("integers without sign", "forward", "k_cache", torch.abs),
    Mutant("scales swapped", "forward", lambda run, a: run({**a, **_swapped_scales(a)})),
)

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
    *map(of_int8, INT8_MUTANTS),
)


def _work(sizes: Sizes, item: int) -> tuple[float, float]:
    rows = sizes["B"] * sizes["T"] * sizes["H"]
    seen = sizes["past"] + (sizes["T"] + 1) / 2
    read = float(sizes["past"] + sizes["T"])
    if sizes["window"]:
        seen = min(seen, sizes["window"] + sizes["sinks"])
        read = min(read, sizes["window"] + sizes["sinks"] + sizes["T"] - 1)
    of_cache = 2.0 * sizes["B"] * read * sizes["G"] * sizes["K"]
    of_cache *= 1.0 + 4.0 / sizes["K"] if sizes["int8"] else item
    return 4.0 * rows * seen * sizes["K"], of_cache + item * 2.0 * rows * sizes["K"]


_SMALL = {"B": 2, "G": 1, "J": 2, "K": 8, "window": 0, "sinks": 0, "room": 1, "int8": False}
_PLAIN = {**_SMALL, "rolling": False, "ragged": False}
_RAGGED = {**_SMALL, "rolling": False, "ragged": True}
_RING = {**_SMALL, "rolling": True, "ragged": False}
_RAGGED_RING = {**_SMALL, "rolling": True, "ragged": True}
_BENCH = {**_PLAIN, "T": 1, "past": 1023, "B": 1, "K": 64, "room": 0}
_DECODE = {**_BENCH, "G": 8, "J": 1}
_DECODE_GQA = {**_BENCH, "G": 2, "J": 4}
_ROLLING = {**_DECODE_GQA, "rolling": True, "past": 5000, "window": 1024, "sinks": 4}

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
            k_scales=a["k_scales"],
            v_scales=a["v_scales"],
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
        "int8": (False, True),
    },
    resolve=_resolve,
    extra=(
        {**_PLAIN, "T": 0, "past": 3},
        {**_RAGGED, "T": 2, "past": 3, "B": 0},
        # Several chunks of keys, cut inside and outside the sinks, before and after the turn.
        {**_PLAIN, "T": 2, "past": 700, "K": 128, "J": 4},
        {**_RAGGED_RING, "T": 3, "past": 900, "K": 64, "G": 2, "J": 8, "window": 300, "sinks": 70},
        {**_RAGGED, "T": 2, "past": 700, "K": 64, "G": 3, "J": 4, "int8": True},
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
        {**_RAGGED, "T": 2, "past": 11, "B": 3, "G": 2, "int8": True},
        {**_RAGGED_RING, "T": 3, "past": 23, "G": 2, "window": 4, "sinks": 3, "int8": True},
    ),
    bench={
        "decode": _DECODE,
        "decode-int8": {**_DECODE, "int8": True},
        "decode-gqa": _DECODE_GQA,
        "decode-gqa-int8": {**_DECODE_GQA, "int8": True},
        "rolling": _ROLLING,
        "rolling-int8": {**_ROLLING, "int8": True},
    },
    work=_work,
    degenerate=lambda s: frozenset({"y"} if 0 in (s["B"], s["T"]) else ()),
    mutants=MUTANTS,
    equivalents={
        "no case has an infinite scale, which gives NaN; tests/ops/test_decode_attention.py has": (
            "widened: scales_BSG.to(wide).where(scales_BSG.isfinite(), float('nan')) -> "
            "scales_BSG.to(wide)",
        ),
        "a weight of zero times any number": ("decode_attention_forward: 0 -> 1 (2)",),
        "zero over any number is zero": ("decode_attention_forward: 1.0 -> 2.0",),
    },
)
