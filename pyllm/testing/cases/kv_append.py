"""``kv_append``, declared once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyllm.testing.cases._cache import draw_int8, draw_positions, of_int8, off_by_one
from pyllm.testing.declaration import Arguments, Draw, Mutant, Operation, Output, Run, Sizes
from pyllm.testing.faults import all_zeros, common, drop_last, given, returned


def _inputs(sizes: Sizes, draw: Draw) -> Arguments:
    cache = (sizes["B"], sizes["S"], sizes["G"], sizes["K"])
    new = (sizes["B"], sizes["T"], sizes["G"], sizes["K"])
    starts, counts = draw_positions(sizes, draw)
    k, v = draw.normal(*new), draw.normal(*new)
    if sizes["int8"]:
        (k_cache, k_scales), (v_cache, v_scales) = (draw_int8(draw, *cache) for _ in range(2))
        # Heads of other sizes, so that a scale of another one is seen; a row of zeros; numbers
        # halfway between two integers, where the scale is 1.
        k, v = (draw.to(x.double() * (0.5 + draw.uniform(*new[:3], 1))) for x in (k, v))
        v[:, :1, -1:] = 0
        halves = torch.tensor([127.0, 0.5, -1.5, 2.5])[: sizes["K"]]
        k[:, 1:2, :1, : len(halves)] = halves.to(k)
        k[:, 1:2, :1, len(halves) :] = 0
    else:
        k_cache, v_cache, k_scales, v_scales = draw.normal(*cache), draw.normal(*cache), None, None
    return {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "starts": starts,
        "counts": counts,
        "sinks": sizes["sinks"],
        "rolling": sizes["rolling"],
        "k_scales": k_scales,
        "v_scales": v_scales,
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
        k_scales=a["k_scales"],
        v_scales=a["v_scales"],
        face=face,
    )
    written = (a["k_cache"], a["v_cache"], a["k_scales"], a["v_scales"])
    return tuple(tensor for tensor in written if tensor is not None)


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


def _swapped(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Keys for values and their scales likewise."""
    return tuple(outputs[i] for i in (1, 0, 3, 2)[: len(outputs)])


def _stale_scales(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """A slot that is used again keeps the scale of what was there."""
    return (*run(a)[:2], a["k_scales"], a["v_scales"])


def _one_scale_for_all_heads(run: Run, a: Arguments) -> tuple[Tensor, ...]:
    """As one row of all heads' channels."""
    flat = {name: a[name].flatten(2).unsqueeze(2) for name in ("k_cache", "v_cache", "k", "v")}
    scales = {name: a[name][:, :, :1].clone() for name in ("k_scales", "v_scales")}
    *caches, k_scales, v_scales = run({**a, **flat, **scales})
    caches = [cache.view_as(a["k_cache"]) for cache in caches]
    return (*caches, k_scales.expand_as(a["k_scales"]), v_scales.expand_as(a["v_scales"]))


def _wrongly_rounded(rounded: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The numbers of both caches are of another rounding."""

    def change(run: Run, a: Arguments) -> tuple[Tensor, ...]:
        new = {name: a[name].float() for name in ("k", "v")}
        largest = {name: x.abs().amax(-1, keepdim=True).clamp_min(1e-30) for name, x in new.items()}
        whole = {name: rounded(x * 127 / largest[name]) for name, x in new.items()}
        # So large that the number which has the scale stays what it is.
        caches = run({**a, **whole})[:2]
        return (*caches, *run(a)[2:])

    return change


def _half_away_from_zero(x: Tensor) -> Tensor:
    return (x.abs() + 0.5).floor() * x.sign()


INT8_MUTANTS = (
    *common("forward", 2, "k_scales"),
    *common("forward", 3, "v_scales"),
    Mutant("stale scales", "forward", _stale_scales),
    Mutant(
        "scales of keys and values swapped", "forward", lambda run, a: (*run(a)[:2], *run(a)[:1:-1])
    ),
    returned("k_scales of the next head", "forward", 2, lambda s: s.roll(1, dims=2)),
    returned("v_scales of the next slot", "forward", 3, lambda s: s.roll(1, dims=1)),
    returned("scales to 128", "forward", 2, lambda s: s * (127 / 128)),
    returned("the scale of zeros is one", "forward", 3, lambda s: s.where(s != 0, 1.0)),
    returned("k without sign", "forward", 0, torch.abs),
    Mutant("one scale for all heads", "forward", _one_scale_for_all_heads),
    Mutant("truncated, not rounded", "forward", _wrongly_rounded(torch.trunc)),
    Mutant("half away from zero", "forward", _wrongly_rounded(_half_away_from_zero)),
)

MUTANTS = (
    all_zeros("forward"),
    *common("forward", 0, "k_cache"),
    *common("forward", 1, "v_cache"),
    Mutant("nothing written", "forward", lambda run, a: run({**a, "counts": 0 * a["counts"]})),
    Mutant("keys only", "forward", lambda run, a: (run(a)[0], a["v_cache"], *run(a)[2:])),
    Mutant("keys and values swapped", "forward", lambda run, a: _swapped(run(a))),
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
    *map(of_int8, INT8_MUTANTS),
)


def _work(sizes: Sizes, item: int) -> tuple[float, float]:
    moved = 2.0 * sizes["B"] * sizes["T"] * sizes["G"] * sizes["K"]
    written = moved * (1.0 + 4.0 / sizes["K"] if sizes["int8"] else item)
    return 0.0, item * moved + written


_SMALL = {"B": 2, "G": 2, "K": 3, "room": 2, "int8": False}
_INT8 = {**_SMALL, "K": 5, "int8": True}
_BENCH = {"ring": 0, "sinks": 0, "G": 8, "K": 64, "ragged": False, "int8": False}
_DECODE = {**_BENCH, "T": 1, "past": 1023, "B": 1, "room": 0}
_PROMPT = {**_BENCH, "T": 512, "past": 0, "B": 4, "room": 512}

KV_APPEND = Operation(
    name="kv_append",
    inputs=_inputs,
    outputs=(
        Output("k_cache", upstream=None, exact=True),
        Output("v_cache", upstream=None, exact=True),
        Output("k_scales", upstream=None, exact=True),
        Output("v_scales", upstream=None, exact=True),
    ),
    gradients=(),
    backward=(),
    mutates=("k_cache", "v_cache", "k_scales", "v_scales"),
    call=_call,
    door_outputs=("k_cache", "v_cache", "k_scales", "v_scales"),
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
        "int8": (False, True),
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
        {**_INT8, "T": 3, "past": 2, "ring": 0, "sinks": 0, "ragged": False},
        {**_INT8, "B": 4, "T": 7, "past": 9, "ring": 3, "sinks": 4, "ragged": True},
    ),
    bench={
        "decode": _DECODE,
        "decode-int8": {**_DECODE, "int8": True},
        "prompt": _PROMPT,
        "prompt-int8": {**_PROMPT, "int8": True},
    },
    work=_work,
    degenerate=lambda s: frozenset(
        {"k_cache", "v_cache", "k_scales", "v_scales"} if s["B"] == 0 else ()
    ),
    mutants=MUTANTS,
    equivalents={
        "scales are float32; only the truth of the tests has them in float64": (
            "kv_append_forward: scale_BTG.to(scales_BSG.dtype) -> scale_BTG",
        ),
        "what lies beyond is not written; only a card minds that it is read": (
            "kv_append_forward: (held_BS - start_B1).clamp(0, n_tokens - 1) -> held_BS - start_B1",
            "kv_append_forward: n_tokens - 1 -> n_tokens",
            "kv_append_forward: n_tokens - 1 -> n_tokens + 1",
        ),
    },
)
