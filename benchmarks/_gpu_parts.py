"""What ``benchmarks/gpu.py`` measures beside training: our kernels and their peers in one run."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from _peers import PEERS
from torch import Tensor

from pyllm.generate import time_decode
from pyllm.models import ModelConfig, Transformer, count_parameters, preset
from pyllm.ops import attention, int8_linear, moe_ffn, quantize_int8
from pyllm.ops._registry import choose_face

Calls = dict[str, Callable[[], object]]
Row = dict[str, Any]

SAMPLE_SECONDS = 2e-3
"""A sample is as many calls in a row as take this long: one alone would time its launch."""
LARGE_CARD = 12 * 2**30
"""Bytes of a card that has room for the large mixture with 1,024 columns an expert."""


def timed(functions: Mapping[str, Callable[[], object]], device: str, seconds: float) -> list[Row]:
    """Median and quartiles of each function, taking turns; what fails gives a row with its reason.

    On a card by its own clock (events), so that only the device's time counts while the host is
    ahead of it.
    """
    rows: list[Row] = []
    calls: dict[str, int] = {}
    for name, function in functions.items():
        try:
            for _ in range(3):
                function()
            once = _sample(function, device, 1)
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append({"name": name, "skipped": reason})
            continue
        calls[name] = max(round(SAMPLE_SECONDS / max(once, 1e-7)), 1)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    order, random = list(calls), Random(0)
    while calls and (time.perf_counter() < end or min(map(len, samples.values())) < 5):
        random.shuffle(order)
        for name in order:
            samples[name].append(_sample(functions[name], device, calls[name]))
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        row = {"name": name, "median": median, "low": low, "high": high}
        rows.append(row | {"samples": len(values), "calls_in_a_sample": calls[name]})
    return rows


def _sample(function: Callable[[], object], device: str, calls: int) -> float:
    """Seconds of one call, of so many in a row."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / calls


def bandwidth(device: str, toy: bool) -> Row:
    """Bytes a second that this device reads and writes when it copies, the best of many copies."""
    source = torch.ones(2**16 if toy else 2**28, device=device)
    target = torch.empty_like(source)
    [row] = timed({"copy": lambda: target.copy_(source)}, device, 0.01 if toy else 0.5)
    moved = 2.0 * source.nbytes
    return row | {"bytes": source.nbytes, "bytes_per_second": moved / row["low"]}


def lift_cap(device: str) -> None:
    """The peers may take what the card has."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def experts(device: str, toy: bool) -> list[Row]:
    """``moe_ffn`` forward and backward beside ``grouped_mm``, ScatterMoE and Liger."""
    shapes = {"moe-158m": {"N": 8192, "D": 512, "F": 864, "E": 16, "A": 2}}
    wide = {"N": 4096, "D": 2048, "F": 1024, "E": 64, "A": 8}
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        if total < LARGE_CARD:
            wide |= {"N": 1024, "F": 128}
    shapes["d=2048, E=64, top-8"] = wide
    if toy:
        shapes = {"moe-158m": {"N": 24, "D": 16, "F": 24, "E": 4, "A": 2}}
    found = []
    for name, sizes in shapes.items():
        for dtype in half_dtypes(device):
            functions, faces = _expert_calls(sizes, dtype, device)
            rows = timed(functions, device, 0.01 if toy else 1.0)
            flops = 3 * 2.0 * sizes["N"] * sizes["A"] * 3 * sizes["D"] * sizes["F"]
            for row in rows:
                if "median" in row:
                    row["flops_per_second"] = flops / row["median"]
            found.append({"shape": name, "sizes": sizes, "dtype": str(dtype), "faces": faces})
            found[-1]["rows"] = against(rows, "pyllm")
            print("experts:", found[-1], flush=True)
    return found


def half_dtypes(device: str) -> list[torch.dtype]:
    """Those of two bytes that run fast here."""
    if device == "cuda" and torch.cuda.is_bf16_supported(False):
        return [torch.bfloat16, torch.float16]
    return [torch.float16] if device == "cuda" else [torch.bfloat16]


def _expert_calls(
    sizes: Mapping[str, int], dtype: torch.dtype, device: str
) -> tuple[Calls, list[str]]:
    """Forward and backward of one mixture, all gradients, by name; and the faces that ran ours."""
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
    return functions, choose_face("moe_ffn", device, None).split(",")


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
    """Add how many times as fast ours is as each other."""
    mine = next((row["median"] for row in rows if row["name"] == ours and "median" in row), None)
    for row in rows:
        if mine is not None and "median" in row and row["name"] != ours:
            row["times_as_slow_as_ours"] = row["median"] / mine
    return rows


def attention_beside_sdpa(device: str, toy: bool) -> list[Row]:
    """Causal and with a window, forward and backward, beside PyTorch's own."""
    batch, n_tokens, heads, groups, head_dim, window = 4, 4096, 16, 4, 64, 512
    if toy:
        batch, n_tokens, heads, groups, head_dim, window = 1, 24, 2, 1, 8, 8
    found = []
    for dtype in half_dtypes(device):
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(batch, n_tokens, count, head_dim) for count in (heads, groups, groups, heads)]
        q, k, v, dy = (
            torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes
        )
        leaves = [one.requires_grad_() for one in (q, k, v)]
        place = torch.arange(n_tokens, device=device)
        back = place[:, None] - place
        band = (back >= 0) & (back < window)
        for seen in (None, window):
            functions: Calls = {}
            ways = {"sdpa": None} if seen is None else {"sdpa, a mask": band, "sdpa, causal": None}
            for stage in ("forward", "forward and backward"):
                calls: Calls = {"pyllm": partial(attention, q, k, v, window=seen)}
                calls |= {name: partial(_sdpa, q, k, v, mask) for name, mask in ways.items()}
                if stage == "forward":
                    functions = {name: _no_grad(call) for name, call in calls.items()}
                else:
                    functions = {name: _back(call, leaves, dy) for name, call in calls.items()}
                rows = against(timed(functions, device, 0.01 if toy else 0.5), "pyllm")
                row = {"dtype": str(dtype), "window": seen, "stage": stage, "rows": rows}
                row["sizes"] = [batch, n_tokens, heads, groups, head_dim]
                found.append(row | {"faces": choose_face("attention", device, None).split(",")})
                print("attention:", found[-1], flush=True)
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(
        *heads_first, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return y.transpose(1, 2)


def _no_grad(call: Callable[[], Any]) -> Callable[[], object]:
    return torch.no_grad()(lambda: call())


def _back(call: Callable[[], Any], leaves: list[Tensor], dy: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call(), leaves, dy)


def int8_row(device: str, toy: bool, top: float) -> Row:
    """``int8_linear`` of one row with a matrix far above the caches, in bytes a second."""
    width = 64 if toy else 16_384
    generator = torch.Generator(device).manual_seed(0)
    rows = [torch.randn(width, generator=generator, device=device) for _ in range(min(width, 64))]
    weight, scale = quantize_int8(torch.stack(rows))
    weight = weight.repeat(width // len(weight), 1)
    scale = scale.repeat(width // len(scale))
    x = torch.randn(1, width, generator=generator, device=device)
    found = []
    for dtype in (torch.float32, *half_dtypes(device)):
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
    faces = choose_face("int8_linear", device, None).split(",")
    return {"sizes": [1, width, width], "faces": faces, "rows": found}


def small_model(toy: bool) -> ModelConfig:
    """moe-158m, or one of its kind that an interpreter can run."""
    config = preset("moe-158m")
    if not toy:
        return config
    small = {"vocab_size": 97, "max_seq_len": 64, "n_layers": 2, "d_model": 32, "d_ff": 24}
    return replace(config, **small, n_heads=4, n_kv_heads=2, n_experts=4)


def decode_beside_floor(device: str, toy: bool, top: float) -> Row:
    """Milliseconds a token of moe-158m in half precision, and what reading its weights takes."""
    config = small_model(toy)
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    model = Transformer(config).to(device, dtype).eval()
    prompt, new = (8, 8) if toy else (128, 256)
    times = time_decode(model, 1, prompt, new)
    count = count_parameters(config)
    weights = (count.active + config.vocab_size * config.d_model) * dtype.itemsize
    cache = 2 * config.n_layers * (prompt + new // 2) * config.n_kv_heads * config.head_dim
    floor = (weights + cache * dtype.itemsize) / top
    low, high = times.quartiles
    found = {
        "model": "toy" if toy else "moe-158m",
        "dtype": str(dtype),
        "prompt_tokens": prompt,
        "new_tokens": new,
        "seconds_a_token": {"median": times.median, "low": low, "high": high},
        "all_tokens_seconds": sum(times.steps) / len(times.steps),
        "bytes_a_token": weights + cache * dtype.itemsize,
        "floor_seconds": floor,
        "times_the_floor": times.median / floor,
    }
    print("decode:", found, flush=True)
    return found


CHILD = """
import json, sys
import torch

def used():
    if not torch.cuda.is_available():
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    free, total = torch.cuda.mem_get_info()
    return total - free

folder, device, dtype, tokens, before = sys.argv[1:]
start = used() if device == "cpu" else int(before)
import pyllm
model = pyllm.load(folder, device=device, dtype=dtype)
model.generate("Once upon a time", max_new_tokens=int(tokens), greedy=True)
cuda = device != "cpu"
print(json.dumps({
    "torch_peak_allocated": torch.cuda.max_memory_allocated() if cuda else None,
    "torch_peak_reserved": torch.cuda.max_memory_reserved() if cuda else None,
    "driver": used() - start if cuda else None,
    "process_growth": None if cuda else used() - start,
}))
"""
"""Loads a model and writes in a process of its own: what PyTorch took at most, and what the driver
says is in use beyond what was before, with context, kernels and graphs."""


def memory(device: str, toy: bool) -> list[Row]:
    """What writing with moe-158m takes, in half precision and in int8."""
    from pyllm.models import quantize_folder, save_model
    from pyllm.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    config = small_model(toy)
    if toy:
        config = replace(config, vocab_size=tokenizer.vocab_size)
    found = []
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        floats, ints = Path(place, "floats"), Path(place, "ints")
        save_model(floats, Transformer(config), tokenizer)
        quantize_folder(floats, ints)
        half = "float16" if device == "cuda" else "bfloat16"
        for dtype, folder in ((half, floats), ("int8", ints)):
            before = 0
            if device == "cuda":
                torch.cuda.empty_cache()
                free, total = torch.cuda.mem_get_info()
                before = total - free
            told = (str(folder), device, dtype, str(8 if toy else 128), str(before))
            command = [sys.executable, "-c", CHILD, *told]
            done = subprocess.run(command, capture_output=True, text=True)
            row: Row = {"dtype": dtype}
            if done.returncode:
                row["error"] = done.stderr.strip().splitlines()[-1:]
            else:
                row |= json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            print("memory:", row, flush=True)
    return found
