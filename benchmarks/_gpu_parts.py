"""What ``benchmarks/gpu.py`` measures of single operations: ours and their peers in one run."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache, partial
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from _peers import PEERS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyllm.ops import attention, int8_linear, moe_ffn, quantize_int8
from pyllm.ops._registry import choose_face

Calls = dict[str, Callable[[], object]]
Row = dict[str, Any]

Keep = Callable[..., None]

SAMPLE_SECONDS = 2e-3
"""A sample is as many calls in a row as take this long: one alone would time its launch."""
ISSUE_SECONDS = 2e-2
"""But not more than the host can ask for in this time, while the device is kept waiting."""
OPTIONAL = ("scattermoe", "liger")
"""Peers that need not be installed."""
LARGE_CARD = 12 * 2**30
"""Bytes of a card that has room for the large mixture with 1,024 columns an expert."""


def timed(functions: Mapping[str, Callable[[], object]], device: str, seconds: float) -> list[Row]:
    """Median and quartiles of each function, taking turns; what fails gives a row with its reason.

    On a card by its own clock (events), and the device's time alone: it is kept busy until the host
    has asked for the whole sample, since a mixture of experts is some twenty launches from Python,
    which may take longer than the work itself on a large card. ``as_called`` is the time without
    that, launches included.
    """
    rows: list[Row] = []
    calls: dict[str, int] = {}
    cycles: dict[str, int] = {}
    for name, function in functions.items():
        try:
            for _ in range(3):  # compiles and tunes
                function()
            once = _sample(function, device, 1)
            issue = _issue_seconds(function) if device == "cuda" else 0.0
        except Exception as error:  # Triton's are no RuntimeErrors
            rows.append({"name": name, "skipped": reason_of(error)})
            continue
        most = max(int(ISSUE_SECONDS / max(issue, 1e-7)), 1)
        calls[name] = min(max(round(SAMPLE_SECONDS / max(once, 1e-7)), 1), most)
        if device == "cuda":
            ahead = min(1.2 * issue * calls[name], ISSUE_SECONDS)  # less for one that waits itself
            cycles[name] = int(ahead * _cycles_per_second())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    order, random = list(calls), Random(0)
    while calls and (time.perf_counter() < end or min(map(len, samples.values())) < 5):
        random.shuffle(order)
        for name in order:
            taken = _sample(functions[name], device, calls[name], cycles.get(name, 0))
            samples[name].append(taken)
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = {"name": name, "median": median, "low": low, "high": high}
        row |= {"samples": len(values), "calls_in_a_sample": calls[name]}
        if device == "cuda":
            plain = [_sample(functions[name], device, calls[name]) for _ in range(9)]
            row["as_called"] = statistics.median(plain)
        rows.append(row)
    return rows


def reason_of(error: BaseException) -> str:
    """Its kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _sample(function: Callable[[], object], device: str, calls: int, cycles: int = 0) -> float:
    """Seconds of one call, of so many in a row, which a card begins after so many cycles."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if cycles:
        torch.cuda._sleep(cycles)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / calls


def _issue_seconds(function: Callable[[], object]) -> float:
    """What the host takes to ask for one call."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(found)


@cache
def _cycles_per_second() -> float:
    """Of the clock that ``torch.cuda._sleep`` counts by."""
    cycles = 20_000_000
    torch.cuda._sleep(cycles)  # the first one wakes the card
    return cycles / _sample(partial(torch.cuda._sleep, cycles), "cuda", 1)


def bandwidth(device: str, toy: bool) -> Row:
    """Bytes a second that this device reads and writes when it copies, the best of many copies."""
    source = torch.ones(2**16 if toy else 2**28, device=device)
    target = torch.empty_like(source)
    [row] = timed({"copy": lambda: target.copy_(source)}, device, 0.01 if toy else 0.5)
    moved = 2.0 * source.nbytes
    return row | {"bytes": source.nbytes, "bytes_per_second": moved / row["low"]}


def experts(device: str, toy: bool, end: float, keep: Keep) -> None:
    """``moe_ffn`` forward and backward beside ``grouped_mm``, ScatterMoE and Liger.

    bfloat16 first: PyTorch's grouped product is a kernel for it alone, and a loop that waits for
    the device in float16.
    """
    shapes = {"moe-158m": {"N": 8192, "D": 512, "F": 864, "E": 16, "A": 2}}
    wide = {"N": 4096, "D": 2048, "F": 1024, "E": 64, "A": 8}
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        if total < LARGE_CARD:
            wide |= {"N": 1024, "F": 128}
    shapes["d=2048, E=64, top-8"] = wide
    if toy:
        shapes = {"moe-158m": {"N": 24, "D": 16, "F": 24, "E": 4, "A": 2}}
    found: list[Row] = []
    for dtype in half_dtypes(device):
        for name, sizes in shapes.items():
            case: Row = {"shape": name, "sizes": sizes, "dtype": str(dtype), "rows": []}
            found.append(case)
            if time.monotonic() > end:
                case["error"] = "no time was left"
                continue
            try:
                functions, case["difference"], case["faces"] = _expert_calls(sizes, dtype, device)
            except Exception as error:  # memory, on a small card
                case["error"] = reason_of(error)
                continue
            others = {name: functions.pop(name) for name in OPTIONAL if name in functions}
            case["rows"] = against(timed(functions, device, 0.01 if toy else 0.5), "pyllm")
            keep(experts=found)
            if others and time.monotonic() < end:  # apart: they may tune for long
                functions = {"pyllm": functions["pyllm"], **others}
                rows = against(timed(functions, device, 0.5), "pyllm")
                case["rows"] += [row for row in rows if row["name"] != "pyllm"]
            flops = 3 * 2.0 * sizes["N"] * sizes["A"] * 3 * sizes["D"] * sizes["F"]
            for row in case["rows"]:
                if "median" in row:
                    row["flops_per_second"] = flops / row["median"]
            print("experts:", case, flush=True)
            keep(experts=found)


def half_dtypes(device: str) -> list[torch.dtype]:
    """Those of two bytes that run fast here."""
    if device == "cuda" and torch.cuda.is_bf16_supported(False):
        return [torch.bfloat16, torch.float16]
    return [torch.float16] if device == "cuda" else [torch.bfloat16]


def _expert_calls(
    sizes: Mapping[str, int], dtype: torch.dtype, device: str
) -> tuple[Calls, float | str, list[str]]:
    """Forward and backward of one mixture, all gradients, by name; how far ours and PyTorch's
    results are apart; and the faces that ran ours."""
    generator = torch.Generator(device).manual_seed(0)
    n, width, hidden, n_experts, top_k = (sizes[name] for name in ("N", "D", "F", "E", "A"))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    x, dy = normal(n, width), normal(n, width)
    w_in = normal(n_experts, 2 * hidden, width, scale=width**-0.5)
    w_out = normal(n_experts, width, hidden, scale=hidden**-0.5)
    logits = torch.randn(n, n_experts, generator=generator, device=device)
    weights, chosen = logits.topk(top_k, dim=-1)
    weights, chosen = weights.softmax(-1), chosen.int()
    leaves = [one.requires_grad_() for one in (x, w_in, w_out, weights)]

    def both(forward: Callable[[], Tensor], wanted: list[Tensor]) -> None:
        torch.autograd.grad(forward(), wanted, dy)

    def ours() -> Tensor:
        return moe_ffn(x, w_in, w_out, weights, chosen, "swiglu")

    named = {"x": x, "w_in": w_in, "w_out": w_out, "weights": weights, "experts": chosen}
    named["activation"] = "swiglu"

    def grouped() -> Tensor:
        return PEERS["moe_ffn"](named)

    functions: Calls = {"pyllm": partial(both, ours, leaves)}
    functions["grouped_mm"] = partial(both, grouped, leaves)
    if device == "cuda":
        functions["scattermoe"] = _scattermoe(both, x, w_in, w_out, weights, chosen)
        functions["liger"] = _liger(both, x, w_in, w_out, weights, chosen)
    return functions, apart(ours, grouped), choose_face("moe_ffn", device, None).split(",")


def apart(ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> float | str:
    """The norm of the difference over that of theirs: is the same thing timed? Or why not."""
    try:
        with torch.no_grad():
            one, other = ours().float(), theirs().float()
            return float((one - other).norm() / other.norm())
    except Exception as error:
        return reason_of(error)


def _scattermoe(both: Any, x: Any, w_in: Any, w_out: Any, weights: Any, chosen: Any) -> Any:
    def call() -> None:
        from scattermoe.mlp import GLUMLP

        if not kept:
            n_experts, columns, width = w_in.shape
            module = GLUMLP(width, columns // 2, n_experts, chosen.shape[1])
            module = module.to(x.device, x.dtype)
            with torch.no_grad():  # it has the columns of the gate last
                gate, up = w_in.chunk(2, dim=1)
                module.experts.weight.copy_(torch.cat([up, gate], dim=1))
                module.output_experts.weight.copy_(w_out)
            kept.append(module)
        wanted = [x, weights, *kept[0].parameters()]
        both(lambda: kept[0](x, weights.to(x.dtype), chosen.long()), wanted)

    kept: list[Any] = []
    return _if_installed(call)


def _liger(both: Any, x: Any, w_in: Any, w_out: Any, weights: Any, chosen: Any) -> Any:
    def call() -> None:
        from liger_kernel.ops import LigerFusedMoEFunction

        def forward() -> Tensor:
            return LigerFusedMoEFunction.apply(x, w_in, w_out, chosen, weights.to(x.dtype))

        both(forward, [x, w_in, w_out, weights])

    return _if_installed(call)


def _if_installed(call: Callable[[], None]) -> Callable[[], None]:
    def checked() -> None:
        try:
            call()
        except (ImportError, AttributeError) as error:
            raise NotImplementedError(str(error)) from None

    return checked


def against(rows: list[Row], ours: str) -> list[Row]:
    """Add how many times as fast ours is as each other, launches left out and included."""
    mine = next((row for row in rows if row["name"] == ours), {})
    for row in rows:
        for key, ratio in (("median", "ours"), ("as_called", "called")):
            if key in mine and key in row and row["name"] != ours:
                row[f"times_as_slow_as_{ratio}"] = row[key] / mine[key]
    return rows


def attention_beside_sdpa(device: str, toy: bool, end: float, keep: Keep) -> None:
    """Causal and with a window, forward and backward, beside PyTorch's own."""
    batch, n_tokens, heads, groups, head_dim, window = 4, 4096, 16, 4, 64, 512
    if toy:
        batch, n_tokens, heads, groups, head_dim, window = 1, 24, 2, 1, 8, 8
    found: list[Row] = []
    for dtype in half_dtypes(device):
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(batch, n_tokens, count, head_dim) for count in (heads, groups, groups, heads)]
        q, k, v, dy = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes
        )
        leaves = [one.requires_grad_() for one in (q, k, v)]
        for seen in (None, window):
            calls: dict[str, Callable[[], Tensor]] = {
                "pyllm": partial(attention, q, k, v, window=seen),
                **_ways_of_pytorch(q, k, v, seen, device),
            }
            for stage in ("forward", "forward and backward"):
                row: Row = {"dtype": str(dtype), "window": seen, "stage": stage, "rows": []}
                found.append(row)
                if time.monotonic() > end:
                    row["error"] = "no time was left"
                    continue
                if stage == "forward":
                    functions = {name: _no_grad(call) for name, call in calls.items()}
                else:
                    functions = {name: _back(call, leaves, dy) for name, call in calls.items()}
                row["rows"] = against(timed(functions, device, 0.01 if toy else 0.4), "pyllm")
                row["sizes"] = [batch, n_tokens, heads, groups, head_dim]
                row["difference"] = apart(calls["pyllm"], list(calls.values())[1])
                row["faces"] = choose_face("attention", device, None).split(",")
                print("attention:", row, flush=True)
                keep(attention=found)
        if device == "cuda" and dtype == half_dtypes(device)[-1] and time.monotonic() < end - 40:
            # Last of all, for the compiler takes its time.
            calls = {"pyllm": calls["pyllm"], "flex_attention": _flex(q, k, v, window)}
            forward = {name: _no_grad(call) for name, call in calls.items()}
            both = {name: _back(call, leaves, dy) for name, call in calls.items()}
            for stage, functions in (("forward", forward), ("forward and backward", both)):
                rows = against(timed(functions, device, 0.4), "pyllm")
                keep(**{f"flex_attention {stage}": {"dtype": str(dtype), "rows": rows}})


def _ways_of_pytorch(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, device: str
) -> dict[str, Callable[[], Tensor]]:
    """The first one computes what ours does.

    Its fused kernels take either grouped heads or a mask. So with a mask the heads of keys and
    values are repeated for it, or it would write all the scores down; and without one it may choose
    from more kernels where they are.
    """
    cudnn = {"sdpa, cuDNN": partial(_sdpa, q, k, v, cudnn=True)} if device == "cuda" else {}
    if window is None:
        return {
            "sdpa": partial(_sdpa, q, k, v),
            "sdpa, heads repeated": partial(_sdpa, q, k, v, repeat=True),
            **cudnn,
        }
    place = torch.arange(q.shape[1], device=device)
    back = place[:, None] - place
    band = (back >= 0) & (back < window)
    return {
        "sdpa, a mask": partial(_sdpa, q, k, v, band, repeat=True),
        "sdpa, causal": partial(_sdpa, q, k, v),
        **cudnn,
    }


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    repeat: bool = False,
    cudnn: bool = False,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if repeat:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if cudnn else nullcontext():
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=not repeat
        )
    return y.transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Callable[[], Tensor]:
    """PyTorch's compiled attention, which skips what the window hides; the first call compiles."""
    kept: list[Any] = []

    def call() -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not kept:
            size = q.shape[1]

            def seen(b: Tensor, h: Tensor, at: Tensor, key: Tensor) -> Tensor:
                return (at >= key) & (at - key < window)

            kept.append(create_block_mask(seen, None, None, size, size, device=q.device.type))
            kept.append(torch.compile(flex_attention, dynamic=False))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        y: Tensor = kept[1](*heads_first, block_mask=kept[0], enable_gqa=True)
        return y.transpose(1, 2)

    return call


def _no_grad(call: Callable[[], Any]) -> Callable[[], object]:
    return torch.no_grad()(lambda: call())


def _back(call: Callable[[], Any], leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(), leaves, dy)


def int8_row(device: str, toy: bool, end: float, keep: Keep) -> None:
    """``int8_linear`` of one row with a matrix far above the caches, in bytes a second."""
    copied = bandwidth(device, toy)
    top = copied["bytes_per_second"]
    keep(bandwidth=copied)
    width = 64 if toy else 16_384
    generator = torch.Generator(device).manual_seed(0)
    rows = [torch.randn(width, generator=generator, device=device) for _ in range(min(width, 64))]
    weight, scale = quantize_int8(torch.stack(rows))
    weight = weight.repeat(width // len(weight), 1)
    scale = scale.repeat(width // len(scale))
    x = torch.randn(1, width, generator=generator, device=device)
    faces = choose_face("int8_linear", device, None).split(",")
    found: list[Row] = []
    for dtype in (*half_dtypes(device), torch.float32):
        functions: Calls = {}
        for quantized in (True, False):
            name = "W8A8" if quantized else "W8A16"
            call = partial(int8_linear, x.to(dtype), weight, scale, quantize_input=quantized)
            functions[name] = _no_grad(call)
        moved = weight.nbytes + scale.nbytes + x.numel() * dtype.itemsize + width * dtype.itemsize
        for row in timed(functions, device, 0.01 if toy else 0.5):
            if "median" in row:
                row["bytes_per_second"] = moved / row["median"]
                row["share_of_bandwidth"] = row["bytes_per_second"] / top
            found.append(row | {"dtype": str(dtype)})
            print("int8_linear:", found[-1], flush=True)
            keep(int8_linear={"sizes": [1, width, width], "faces": faces, "rows": found})
