"""Time the faces of the operations beside each other, at the sizes their declarations name.

``python benchmarks/ops.py --op rms_norm`` runs every face that this machine has, forward and
backward, taking turns so that a drift of the clock meets all of them alike. The peer is what a
PyTorch user would call instead (``_peers.py``), its backward the one of autograd; the ratio is to
it, or to the reference where PyTorch has no such operation.
Percentages are of the ceiling measured in the same run: a copy for bytes, a matrix product for
operations. Writes ``benchmarks/results/ops-<cpu|card>-<date>.json``.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -m` and the tests import it too

from _machine import RESULTS, card, describe, write_results
from _peers import KEPT, PEERS
from rich.console import Console
from rich.table import Table

from pyllm._checks import check_size, is_finite, shown
from pyllm._cli import require_writable, run
from pyllm.models import choose_device
from pyllm.ops._registry import FACE_PACKAGES, face_module
from pyllm.testing import OPERATIONS, OpCase
from pyllm.testing.check import expectations, run_backward, run_forward, unserved
from pyllm.testing.suite import faces_on

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FACES = ("torch", *(face for face in FACE_PACKAGES if face != "torch"))
CACHE_BYTES = 256 * 2**20
"""Written between two calls of a cold timing: more than a last-level cache holds."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    low: float
    high: float
    calls: int


def take_turns(
    functions: Mapping[str, Callable[[], object]], seconds: float, device: str, cold: bool
) -> dict[str, Timing]:
    """Call every function in turn until ``seconds`` have passed for each.

    In another order each time: one finds in the caches what the one before it left there, and the
    reference leaves nothing of the weights, a kernel all of them. Low and high are the first and
    the third quartile. ``cold`` flushes the caches before a call.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    dirt = torch.empty(CACHE_BYTES if cold else 1, dtype=torch.int8, device=device)
    for function in functions.values():
        for _ in range(3):
            function()
    # What is flushed between two calls counts too, or a cold run would never end.
    end = time.perf_counter() + seconds * len(functions)
    order, random = list(functions), Random(0)
    while time.perf_counter() < end or min(map(len, samples.values())) < 5:
        random.shuffle(order)
        for name in order:
            if cold:
                dirt.fill_(1)
            samples[name].append(_seconds_of(functions[name], device))
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, low, high, len(values))
    return timings


def _seconds_of(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ceilings(dtype: torch.dtype, device: str) -> dict[str, float]:
    """What this machine can do now: bytes/s of a copy, operations/s of a 2048 matrix product."""
    source = torch.ones(64 * 2**20, device=device)  # 256 MiB: not from a cache
    target = torch.empty_like(source)
    a = torch.randn(2048, 2048, device=device).to(dtype)
    timings = take_turns(
        {"copy": lambda: target.copy_(source), "matmul": lambda: a @ a}, 0.5, device, cold=False
    )
    return {
        "bytes_per_second": 2.0 * source.numel() * 4 / timings["copy"].low,
        "flops_per_second": 2.0 * 2048**3 / timings["matmul"].low,
    }


Calls = dict[str, Callable[[], object]]


def prepare(
    case: OpCase, dtype: torch.dtype, device: str
) -> tuple[Calls, Calls, list[dict[str, Any]]]:
    """Calls of the forward and of the backward by face, and a row with the reason for each face
    that cannot run here."""
    available = [face for face in FACES if face_module(case.op, face) is not None]
    inputs = case.make_inputs(dtype, device)
    upstreams = expectations(case, dtype, device, 0)[2]
    forward: Calls = {}
    backward: Calls = {}
    rows: list[dict[str, Any]] = []
    for face in faces_on(device, available):
        module = face_module(case.op, face)
        try:
            if (reason := unserved(module, inputs)) is not None:
                raise ValueError(reason)
            saved = run_forward(case, module, inputs)
            # The face alone, as the peer: the tests' bookkeeping takes 2 us.
            forward[face] = partial(getattr(module, f"{case.op}_forward"), *inputs.values())
            run_backward(case, module, inputs, saved, upstreams)
        except Exception as error:  # Triton's are no RuntimeErrors
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            stage = "backward" if face in forward else "forward"
            rows.append({"stage": stage, "face": face, "skipped": reason})
            continue
        if "backward" in case.operation.stages:
            backward[face] = lambda module=module, saved=saved: run_backward(
                case, module, inputs, saved, upstreams
            )
    if case.op in PEERS:
        add_peer(case, inputs, upstreams, forward, backward, rows)
    return forward, backward, rows


def time_case(
    case: OpCase, dtype: torch.dtype, device: str, seconds: float, cold: bool
) -> list[dict[str, Any]]:
    """One row for each stage and face; a face that cannot run here gives a row with its reason."""
    forward, backward, rows = prepare(case, dtype, device)
    flops, moved = case.operation.work(case.sizes, dtype.itemsize)
    for stage, functions in (("forward", forward), ("backward", backward)):
        if not functions:
            continue
        timings = take_turns(functions, seconds, device, cold)
        peer = timings.get("peer") or timings["reference"]
        for face, timing in timings.items():
            row = {"stage": stage, "face": face, **vars(timing)}
            row["ratio_to_peer"] = timing.median / peer.median
            if stage == "forward":  # the declaration states the work of a forward
                row["bytes_per_second"] = moved / timing.median
                row["flops_per_second"] = flops / timing.median
            rows.append(row)
    return rows


def add_peer(
    case: OpCase,
    inputs: Mapping[str, Any],
    upstreams: Mapping[str, torch.Tensor],
    forward: Calls,
    backward: Calls,
    rows: list[dict[str, Any]],
) -> None:
    """Add PyTorch's own way under the name ``peer``; its backward is autograd's alone."""
    leaves = {
        name: value.detach().clone().requires_grad_() if name in case.operation.gradients else value
        for name, value in inputs.items()
    }
    wanted = [leaves[name] for name in case.operation.gradients]
    try:
        leaves = KEPT.get(case.op, dict)(leaves)
        y = PEERS[case.op](leaves)
        if wanted:
            upstream = next(iter(upstreams.values())).to(y.dtype)
            torch.autograd.grad(y, wanted, upstream, retain_graph=True)
    except (NotImplementedError, RuntimeError) as error:
        rows.append({"stage": "both", "face": "peer", "skipped": str(error).splitlines()[0]})
        return
    forward["peer"] = lambda: PEERS[case.op](leaves)
    if wanted:
        backward["peer"] = lambda: torch.autograd.grad(y, wanted, upstream, retain_graph=True)


def show(console: Console, title: str, rows: list[dict[str, Any]], top: dict[str, float]) -> None:
    """Print one case as a table."""
    table = Table(title=title, title_justify="left")
    for column in ("stage", "face", "median", "quartiles", "calls", "x peer", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="left" if column in ("stage", "face") else "right")
    for row in rows:
        if "skipped" in row:
            table.add_row(row["stage"], row["face"], "not here", row["skipped"][:24])
            continue
        rates = [
            f"{row[key] / 1e9:.1f} ({100 * row[key] / top[key]:.0f}%)" if key in row else ""
            for key in ("bytes_per_second", "flops_per_second")
        ]
        table.add_row(
            row["stage"],
            row["face"],
            f"{row['median'] * 1e6:.1f} us",
            f"{row['low'] * 1e6:.1f} - {row['high'] * 1e6:.1f}",
            str(row["calls"]),
            f"{row['ratio_to_peer']:.2f}",
            *rates,
        )
    console.print(table)


@dataclass(frozen=True)
class Config:
    """Time the faces of the operations beside each other, at the sizes they declare."""

    op: tuple[Literal[tuple(OPERATIONS)], ...] = tuple(OPERATIONS)
    """Which to time."""
    dtype: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16")
    """Of the inputs."""
    threads: int = 0
    """CPU threads; 0 for PyTorch's choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: the card, if there is one."""
    seconds: float = 0.5
    """Of calls for each face and stage."""
    cold: bool = False
    """Flush the caches between calls."""

    def __post_init__(self) -> None:
        check_size("threads", self.threads, 0, 1024)
        if not self.op or not self.dtype:
            raise ValueError("op and dtype need at least one value each")
        if not is_finite(self.seconds) or self.seconds <= 0:
            raise ValueError(f"seconds must be above 0, got {shown(self.seconds)}")


def main(options: Config) -> None:
    """Time, print, write."""
    device = choose_device(options.device).type
    require_writable(RESULTS)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # into a file or a pipe: whole columns
    machine = describe()
    where = machine["card"] if device == "cuda" else machine["processor"]
    console.print(f"{where}, {torch.get_num_threads()} threads, commit {machine['commit']}")
    measured = []
    for dtype_name in options.dtype:
        dtype = DTYPES[dtype_name]
        top = ceilings(dtype, device)
        console.print(
            f"{dtype_name}: copy {top['bytes_per_second'] / 1e9:.1f} GB/s, "
            f"matmul {top['flops_per_second'] / 1e9:.0f} GFLOP/s"
        )
        for op in options.op:
            for name, sizes in OPERATIONS[op].bench.items():
                case = OPERATIONS[op].case(sizes)
                rows = time_case(case, dtype, device, options.seconds, options.cold)
                show(console, f"{op} {name} ({case.label}) {dtype_name}", rows, top)
                measured.append(
                    {
                        "op": op,
                        "name": name,
                        "sizes": dict(case.sizes),
                        "dtype": dtype_name,
                        "ceilings": top,
                        "rows": rows,
                    }
                )
    label = (card() or "card").replace(" ", "-").lower() if device == "cuda" else "cpu"
    path = write_results(
        f"ops-{label}",
        {"threads": torch.get_num_threads(), "cold": options.cold, "cases": measured},
    )
    console.print(f"written: {path}")


if __name__ == "__main__":
    run(main, Config)
