"""``kv_append``, declared once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyllm.testing.cases._cache import draw_positions, off_by_one
from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    cache = (sizes["B"], sizes["S"], sizes["G"], sizes["K"])
    new = (sizes["B"], sizes["T"], sizes["G"], sizes["K"])
    starts, counts = draw_positions(sizes, draw)
    return {
        "k_cache": draw.normal(*cache),
        "v_cache": draw.normal(*cache),
        "k": draw.normal(*new),
        "v": draw.normal(*new),
        "starts": starts,
        "counts": counts,
        "sinks": sizes["sinks"],
        "rolling": sizes["rolling"],
    }


def _resolve(sizes: Sizes) -> dict[str, Any]:
    """``ring`` slots beside the sinks, or with 0 a contiguous cache with ``room`` to spare."""
    rest = {axis: size for axis, size in sizes.items() if axis not in ("ring", "room")}
    ring = sizes["ring"]
    slots = sizes["sinks"] + ring if ring else max(sizes["past"] + sizes["T"] + sizes["room"], 1)
    return {"S": slots, "rolling": ring > 0, **rest}


def _call(door: Callable[..., Any], a: Arguments, face: str | None) -> tuple[Tensor, ...]:
    door(
        a["k_cache"],
        a["v_cache"],
        a["k"],
        a["v"],
        a["starts"],
        a["counts"],
        sinks=a["sinks"],
        rolling=a["rolling"],
        face=face,
    )
    return a["k_cache"], a["v_cache"]


def _only_first_row(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    counts = a["counts"].clone()
    counts[1:] = 0
    return run({**a, "counts": counts})


def _padding_written(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """All T tokens of every row, as far as there is room."""
    n_tokens, n_slots = a["k"].shape[1], a["k_cache"].shape[1]
    room = n_tokens if a["rolling"] else n_slots - a["starts"]
    return run({**a, "counts": torch.full_like(a["counts"], n_tokens).clamp(max=room)})


def _first_of_a_slot_stays(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """Of more than the ring holds, the first are kept instead of the last."""
    if not a["rolling"]:
        return run(a)
    ring = a["k_cache"].shape[1] - a["sinks"]
    return run({**a, "counts": a["counts"].clamp(max=ring)})


def _ring_begins_at_slot_zero(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    return run({**a, "sinks": 0})


MUTANTS = (
    all_zeros("forward"),
    *common("forward", 0, "k_cache"),
    *common("forward", 1, "v_cache"),
    Mutant("nothing written", "forward", lambda run, a: (a["k_cache"], a["v_cache"])),
    Mutant("keys only", "forward", lambda run, a: (run(a)[0], a["v_cache"])),
    Mutant("keys and values swapped", "forward", lambda run, a: run(a)[::-1]),
    given("values are the keys", "forward", "v", lambda v: v.roll(1, dims=1)),
    given("starts off by one", "forward", "starts", off_by_one),
    given("counts off by one", "forward", "counts", off_by_one),
    given("starts of another row", "forward", "starts", lambda starts: starts.roll(1)),
    given("always from the front", "forward", "starts", torch.zeros_like),
    given("k: heads shifted", "forward", "k", lambda k: k.roll(1, dims=2)),
    given("k: last channel dropped", "forward", "k", lambda k: drop_last(k, 3)),
    given("v: last token dropped", "forward", "v", lambda v: drop_last(v, 1)),
    given("does not roll", "forward", "rolling", lambda rolling: False),
    Mutant("first row only", "forward", _only_first_row),
    Mutant("padding written", "forward", _padding_written),
    Mutant("first of a slot stays", "forward", _first_of_a_slot_stays),
    Mutant("sinks overwritten", "forward", _ring_begins_at_slot_zero),
    returned("k_cache: all of it shifted", "forward", 0, lambda cache: cache.roll(1, dims=1)),
)


def _work(sizes: Sizes, item: int) -> tuple[float, float]:
    moved = 2.0 * sizes["B"] * sizes["T"] * sizes["G"] * sizes["K"]
    return 0.0, 2.0 * item * moved


_SMALL = {"B": 2, "G": 2, "K": 3, "room": 2}
_BENCH = {"ring": 0, "sinks": 0, "G": 8, "K": 64, "ragged": False}

KV_APPEND = Operation(
    name="kv_append",
    inputs=_inputs,
    outputs=(
        Output("k_cache", upstream=None, exact=True),
        Output("v_cache", upstream=None, exact=True),
    ),
    gradients=(),
    backward=(),
    mutates=("k_cache", "v_cache"),
    call=_call,
    door_outputs=("k_cache", "v_cache"),
    axes={
        "T": (0, 1, 2, 3, 7, 16, 17, 33),
        "past": (0, 1, 2, 5, 16, 40),
        "ring": (0, 1, 2, 5, 16, 64),
        "sinks": (0, 1, 4),
        "G": (1, 2, 3),
        "K": (1, 8, 31, 64),
        "B": (1, 2, 3),
        "room": (0, 1, 7),
        "ragged": (False, True),
    },
    resolve=_resolve,
    extra=(
        {**_SMALL, "B": 0, "T": 3, "past": 0, "ring": 0, "sinks": 0, "ragged": True},
        {**_SMALL, "T": 700, "past": 90, "ring": 512, "sinks": 4, "K": 64, "ragged": True},
    ),
    tiny={**_SMALL, "T": 3, "past": 4, "ring": 4, "sinks": 1, "ragged": True},
    smoke=(
        {**_SMALL, "T": 3, "past": 4, "ring": 0, "sinks": 0, "ragged": False},
        {**_SMALL, "B": 4, "T": 5, "past": 7, "ring": 0, "sinks": 2, "ragged": True},
        {**_SMALL, "T": 4, "past": 9, "ring": 5, "sinks": 0, "ragged": False},
        {**_SMALL, "B": 4, "T": 7, "past": 2, "ring": 3, "sinks": 4, "ragged": True},
        {**_SMALL, "T": 1, "past": 11, "ring": 5, "sinks": 2, "ragged": False},
        {**_SMALL, "T": 2, "past": 3, "ring": 8, "sinks": 6, "ragged": False},
    ),
    bench={
        "decode": {**_BENCH, "T": 1, "past": 1023, "B": 1, "room": 0},
        "prompt": {**_BENCH, "T": 512, "past": 0, "B": 4, "room": 512},
    },
    work=_work,
    degenerate=lambda s: frozenset({"k_cache", "v_cache"} if s["B"] == 0 else ()),
    mutants=MUTANTS,
    equivalents={
        "slot `sinks` is the first of the ring": (
            "slots_of: position < sinks -> position <= sinks",
        ),
        "of two writes to one slot PyTorch keeps the last, on the CPU and as it happens": (
            "kv_append_forward: if rolling: oldest_B1 = end_B1 - (n_slots - sinks) kept_BT &= "
            "(position_BT < sinks) | (position_BT >= oldest_B1) -> if not rolling: oldest_B1 = "
            "end_B1 - (n_slots - sinks) kept_BT &= (position_BT < sinks) | (position_BT >= "
            "oldest_B1)",
            "kv_append_forward: n_slots - sinks -> n_slots + sinks",
            "kv_append_forward: n_slots - sinks -> n_slots",
            "kv_append_forward: kept_BT &= (position_BT < sinks) | (position_BT >= oldest_B1) -> "
            "pass",
            "kv_append_forward: position_BT < sinks -> position_BT <= sinks",
        ),
    },
)
