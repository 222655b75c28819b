"""How the cost of a unit of work changes as the work grows: tokens, experts, context.

    python benchmarks/growth.py

One size grows, all others stay those of a layer of ``moe-158m``. The cost is time over the
floating-point operations that the operation's declaration counts (a backward: twice those of its
forward), or over the bytes that must move where memory is what limits (decoding). All sizes of a
table take turns, and freed memory is kept, as in training. What costs more at the largest size than
1.2 times the best one does not scale. Writes ``benchmarks/results/growth-<date>.json``.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the tests import it too

from _record import Record
from ops import DTYPES, take_turns

from pyllm._checks import check_size, is_finite, shown
from pyllm._cli import require_writable, run
from pyllm.models import preset
from pyllm.ops._registry import choose_face, face_module
from pyllm.testing import OPERATIONS, OpCase
from pyllm.testing.check import run_backward, run_forward
from pyllm.train.device import keep_freed_memory

LIMIT = 1.2
"""What the largest size may cost, as a multiple of the best."""
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
CONTEXT = (128, 256, 512, 1024, 2048, 4096, 8192)
EXPERTS = (4, 8, 16, 32, 64)
_MODEL = preset("moe-158m")
_MOE = {
    "D": _MODEL.d_model,
    "F": _MODEL.d_ff,
    "A": _MODEL.top_k,
    "load": "even",
    "act": _MODEL.activation,
}
_HEADS = {
    "B": 1,
    "G": _MODEL.n_kv_heads,
    "J": _MODEL.n_heads // _MODEL.n_kv_heads,
    "K": _MODEL.head_dim,
}


@dataclass(frozen=True)
class Sweep:
    """An operation at sizes of which one grows."""

    name: str
    op: str
    """An operation of pyllm, or ``linear``: PyTorch's product in the dense parts."""
    axis: Literal["tokens", "experts", "context"]
    values: Sequence[int]
    sizes: Callable[[int, int], dict[str, Any]]
    """Value of the axis, and the most tokens where they stand still, to the operation's sizes."""
    work: Literal["flops", "bytes"] = "flops"
    stages: tuple[str, ...] = ("forward", "backward")


def _attention(window: int) -> Callable[[int, int], dict[str, Any]]:
    return lambda value, _: {**_HEADS, "T": value, "past": 0, "window": window, "causal": True}


def _decode(window: int) -> Callable[[int, int], dict[str, Any]]:
    rest = {**_HEADS, "T": 1, "room": 0, "sinks": 0, "ragged": False, "int8": False}
    rolling = window > 0
    return lambda value, _: {**rest, "past": value - 1, "window": window, "rolling": rolling}


SWEEPS = (
    Sweep("moe_ffn", "moe_ffn", "tokens", TOKENS, lambda n, _: {**_MOE, "N": n, "E": 16}),
    Sweep(
        "linear_cross_entropy",
        "linear_cross_entropy",
        "tokens",
        TOKENS,
        lambda n, _: {"N": n, "D": _MODEL.d_model, "V": 4096, "ignored": "none"},
    ),
    Sweep(
        "qkv projection",
        "linear",
        "tokens",
        TOKENS,
        lambda n, _: {"N": n, "D": _MODEL.d_model, "F": 2 * _MODEL.d_model},
    ),
    Sweep(
        "rms_norm",
        "rms_norm",
        "tokens",
        TOKENS,
        lambda n, _: {"N": n, "D": _MODEL.d_model},
        work="bytes",
    ),
    Sweep(
        "moe_ffn",
        "moe_ffn",
        "experts",
        EXPERTS,
        lambda n, tokens: {**_MOE, "N": min(tokens, 1024), "E": n},
    ),
    Sweep("attention", "attention", "context", CONTEXT, _attention(0)),
    Sweep("attention, window 256", "attention", "context", CONTEXT, _attention(256)),
    Sweep(
        "decode_attention",
        "decode_attention",
        "context",
        CONTEXT,
        _decode(0),
        work="bytes",
        stages=("forward",),
    ),
    Sweep(
        "decode_attention, window 256",
        "decode_attention",
        "context",
        CONTEXT,
        _decode(256),
        work="bytes",
        stages=("forward",),
    ),
)


@dataclass(frozen=True)
class Config:
    """Time operations at growing sizes, over the work that they do."""

    op: tuple[str, ...] = field(default_factory=lambda: tuple(dict.fromkeys(s.op for s in SWEEPS)))
    """Which to time."""
    dtype: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of the inputs."""
    most: int = 8192
    """Leave larger sizes out."""
    seconds: float = 0.5
    """Of calls for each size; five calls at least."""
    threads: int = 2
    """CPU threads."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file."""

    def __post_init__(self) -> None:
        check_size("threads", self.threads, 1, 1024)
        check_size("most", self.most, 1, 2**20)
        if not is_finite(self.seconds) or self.seconds <= 0:
            raise ValueError(f"seconds must be above 0, got {shown(self.seconds)}")
        known = {sweep.op for sweep in SWEEPS}
        if unknown := set(self.op) - known:
            raise ValueError(f"op must be among {', '.join(sorted(known))}, got {unknown.pop()}")


def main(config: Config) -> None:
    """Time, print, write."""
    require_writable(config.results)
    torch.set_num_threads(config.threads)
    keep_freed_memory()
    record = Record(config.results, "growth")
    record.add(threads=config.threads, limit=LIMIT, d_model=_MODEL.d_model, d_ff=_MODEL.d_ff)
    tables: list[dict[str, Any]] = []
    for sweep in SWEEPS:
        for dtype_name in config.dtype:
            if sweep.op in config.op:
                tables += time_sweep(sweep, dtype_name, config)
                record.add(tables=tables)
                for table in tables[-len(sweep.stages) :]:
                    print(describe_table(table), flush=True)
    print(record.path)


def time_sweep(sweep: Sweep, dtype_name: str, config: Config) -> list[dict[str, Any]]:
    """A table for each stage of an operation."""
    values = [value for value in sweep.values if value <= config.most] or sweep.values[:1]
    functions: dict[str, dict[str, Callable[[], object]]] = {stage: {} for stage in sweep.stages}
    work = {}
    for value in values:
        sizes = sweep.sizes(value, config.most)
        prepare = prepare_linear if sweep.op == "linear" else prepare_operation
        calls, work[value] = prepare(sweep, sizes, DTYPES[dtype_name])
        for stage in sweep.stages:
            functions[stage][str(value)] = calls[stage]
    tables = []
    for stage in sweep.stages:
        timings = take_turns(functions[stage], config.seconds, "cpu", cold=False)
        rows = []
        for value in values:
            amount = work[value] * (2 if stage == "backward" else 1)
            timing = vars(timings[str(value)])
            cost = timing["median"] / amount
            rows.append({"size": value, "work": amount, "cost": cost, **timing})
        best = min(rows, key=lambda row: row["cost"])
        ratio = rows[-1]["cost"] / best["cost"]
        tables.append(
            {
                "name": sweep.name,
                "axis": sweep.axis,
                "dtype": dtype_name,
                "stage": stage,
                "unit": sweep.work,
                "rows": rows,
                "best": best["size"],
                "ratio": ratio,
                "holds": ratio <= LIMIT,
            }
        )
    return tables


def prepare_operation(
    sweep: Sweep, sizes: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], float]:
    """Calls of the face that the CPU's door chooses, by stage, and the work of a forward."""
    case: OpCase = OPERATIONS[sweep.op].case(sizes)
    face = face_module(sweep.op, choose_face(sweep.op, "cpu", None))
    inputs = case.make_inputs(dtype)
    calls: dict[str, Callable[[], object]] = {"forward": lambda: run_forward(case, face, inputs)}
    if "backward" in sweep.stages:
        outputs = run_forward(case, face, inputs)
        upstreams = {
            f"d{output.name}": torch.randn_like(outputs[output.name])
            for output in case.operation.outputs
            if output.upstream is not None
        }
        calls["backward"] = lambda: run_backward(case, face, inputs, outputs, upstreams)
    flops, moved = case.operation.work(case.sizes, dtype.itemsize)
    return calls, flops if sweep.work == "flops" else moved


def prepare_linear(
    sweep: Sweep, sizes: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Callable[[], object]], float]:
    """The same for PyTorch's own product."""
    x_ND = torch.randn(sizes["N"], sizes["D"], dtype=dtype, requires_grad=True)
    weight_FD = torch.randn(sizes["F"], sizes["D"], dtype=dtype, requires_grad=True)
    y_NF = torch.nn.functional.linear(x_ND, weight_FD)
    dy_NF = torch.randn_like(y_NF)
    calls = {
        "forward": lambda: torch.nn.functional.linear(x_ND, weight_FD),
        "backward": lambda: torch.autograd.grad(y_NF, (x_ND, weight_FD), dy_NF, retain_graph=True),
    }
    return calls, 2.0 * sizes["N"] * sizes["D"] * sizes["F"]


def describe_table(table: dict[str, Any]) -> str:
    """One line: picoseconds for a unit of work at each size, and whether the target holds."""
    unit = {"flops": "FLOP", "bytes": "byte"}[table["unit"]]
    costs = ", ".join(f"{row['size']}: {row['cost'] * 1e12:.3g}" for row in table["rows"])
    verdict = "holds" if table["holds"] else "MISSED"
    return (
        f"{table['name']} {table['stage']} {table['dtype']}, ps/{unit} by {table['axis']}: {costs};"
        f" largest / best ({table['best']}) {table['ratio']:.2f}, target {LIMIT}: {verdict}"
    )


if __name__ == "__main__":
    run(main, Config)
