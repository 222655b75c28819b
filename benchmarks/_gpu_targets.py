"""What was promised of a GPU, beside what ``benchmarks/gpu.py`` has measured."""

from collections.abc import Iterator, Mapping
from typing import Any

Row = dict[str, Any]

MEMORY = {"float16": 400e6, "int8": 250e6}
"""Bytes that PyTorch may allocate at most to write with moe-158m; the seed took 706 MB."""

CHOSEN = ("sdpa", "sdpa, heads repeated", "sdpa, a mask", "sdpa, causal")
"""Calls of PyTorch's attention; cuDNN is asked for by name, and FlexAttention is another one."""


def beside_targets(content: Mapping[str, Any], promised: bool) -> list[Row]:
    """A row for each promise: what, target, measured (None where it was not) and whether it is
    met: None where it was not measured, or at other sizes or on another device than ``promised``.
    """
    rows = [
        *_experts(content.get("experts")),
        *_attention(content.get("attention")),
        *_int8(content.get("int8_linear")),
        *_decode(content.get("decode_beside_floor")),
        *_memory(content.get("memory")),
        *_training(content.get("training")),
    ]
    return rows if promised else [row | {"met": None} for row in rows]


def _row(what: str, target: float, measured: float | None, least: bool, **more: Any) -> Row:
    met = None
    if measured is not None:
        met = measured >= target if least else measured <= target
    bound = "at least" if least else "at most"
    return {"what": what, bound: target, "measured": measured, "met": met, **more}


def _experts(found: Any) -> Iterator[Row]:
    what = "moe_ffn forward and backward, times as fast as"
    peers = ("grouped_mm", "scattermoe", "liger")
    cases = found or [{"shape": None, "dtype": None, "rows": []}]
    for case in cases:
        rows = {row["name"]: row for row in case["rows"]}
        for peer in peers if found else peers[:1]:
            row = rows.get(peer, {})
            if peer == "grouped_mm" or "times_as_slow_as_ours" in row:
                yield _row(
                    f"{what} {peer}",
                    1.2,
                    row.get("times_as_slow_as_ours"),
                    True,
                    shape=case["shape"],
                    dtype=case["dtype"],
                    as_called=row.get("times_as_slow_as_called"),
                )


def _attention(found: Any) -> Iterator[Row]:
    """The best of the ways that PyTorch chooses by itself counts: with a window the one without
    it, too."""
    for case in found or [{"window": None, "rows": []}, {"window": 512, "rows": []}]:
        windowed = case["window"] is not None
        ratios = {
            row["name"]: row["times_as_slow_as_ours"]
            for row in case["rows"]
            if row["name"] in CHOSEN and "times_as_slow_as_ours" in row
        }
        best = min(ratios, key=lambda name: ratios[name], default=None)
        yield _row(
            f"attention {'with a window' if windowed else 'causal'}, times as fast as SDPA",
            1.5 if windowed else 1.0,
            None if best is None else ratios[best],
            True,
            fastest=best,
            stage=case.get("stage"),
            dtype=case.get("dtype"),
        )


def _int8(found: Any) -> Iterator[Row]:
    rows = [row for row in (found or {}).get("rows", []) if "share_of_bandwidth" in row]
    for row in rows or [{}]:
        yield _row(
            "int8_linear of one row, share of the bandwidth of a copy",
            0.85,
            row.get("share_of_bandwidth"),
            True,
            way=row.get("name"),
            dtype=row.get("dtype"),
        )


def _decode(found: Any) -> Iterator[Row]:
    yield _row(
        "decoding moe-158m, seconds a token",
        1e-3,
        found["seconds_a_token"]["median"] if found else None,
        False,
        floor=found["floor_seconds"] if found else None,
    )


def _memory(found: Any) -> Iterator[Row]:
    rows = {row["dtype"]: row for row in found or []}
    for dtype, most in MEMORY.items():
        row = rows.get(dtype, {})
        measured, driver = row.get("torch_peak_allocated"), row.get("driver")
        yield _row(f"writing with moe-158m in {dtype}, bytes", most, measured, False, driver=driver)


def _training(found: Any) -> Iterator[Row]:
    """The seed's headline, 2.2 nats in 5,000 steps, was on ten times the text: no promise."""
    found = found or {}
    cap = found.get("memory_cap")
    if cap is not None and found.get("peak_reserved") is not None:
        yield _row(
            "training moe-158m-gpt, bytes that PyTorch reserved",
            cap,
            found["peak_reserved"],
            False,
            tokens_per_second=found.get("tokens_per_second"),
            val_loss=found.get("val_loss"),
        )
    else:
        yield _row("training moe-158m-gpt, bytes that PyTorch reserved", 3.4 * 2**30, None, False)
