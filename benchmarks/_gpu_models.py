"""What ``benchmarks/gpu.py`` measures of whole models: decoding, memory; and all operations."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from _gpu_parts import Row, bandwidth, reason_of, timed

from pyllm.generate import time_decode
from pyllm.models import ModelConfig, Transformer, count_parameters, preset

Keep = Callable[..., None]


def small_model(toy: bool) -> ModelConfig:
    """moe-158m, or one of its kind that an interpreter can run."""
    config = preset("moe-158m")
    if not toy:
        return config
    small = {"vocab_size": 97, "max_seq_len": 64, "n_layers": 2, "d_model": 32, "d_ff": 24}
    return replace(config, **small, n_heads=4, n_kv_heads=2, n_experts=4)


def decode_beside_floor(device: str, toy: bool, end: float, keep: Keep) -> None:
    """Milliseconds a token of moe-158m in half precision, and what reading its weights takes."""
    top = bandwidth(device, toy)["bytes_per_second"]
    config = small_model(toy)
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    model = Transformer(config).to(device, dtype).eval()
    prompt, new = (8, 8) if toy else (128, 256)
    times = time_decode(model, 1, prompt, new)
    count = count_parameters(config)
    # Without the embedding's row, which is read too, but with the projection, which it is as well.
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
        "bytes_per_second_of_a_copy": top,
        "floor_seconds": floor,
        "times_the_floor": times.median / floor,
    }
    print("decode:", found, flush=True)
    keep(decode_beside_floor=found)


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


def memory(device: str, toy: bool, end: float, keep: Keep) -> None:
    """What writing with moe-158m takes, in half precision and in int8."""
    from pyllm.models import quantize_folder, save_model
    from pyllm.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    config = small_model(toy)
    if toy:
        config = replace(config, vocab_size=tokenizer.vocab_size)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        floats, ints = Path(place, "floats"), Path(place, "ints")
        save_model(floats, Transformer(config), tokenizer)
        half = "float16" if device == "cuda" else "bfloat16"
        for dtype, folder in ((half, floats), ("int8", ints)):
            if folder == ints:
                quantize_folder(floats, ints)
            before = 0
            if device == "cuda":
                torch.cuda.empty_cache()
                free, total = torch.cuda.mem_get_info()
                before = total - free
            told = (str(folder), device, dtype, str(8 if toy else 128), str(before))
            command = [sys.executable, "-c", CHILD, *told]
            left = max(end - time.monotonic(), 5.0)
            row: Row = {"dtype": dtype}
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=left)
            except subprocess.TimeoutExpired:
                row["error"] = f"not done in {left:.0f} s"
            else:
                if done.returncode:
                    row["error"] = done.stderr.strip().splitlines()[-1:]
                else:
                    row |= json.loads(done.stdout.splitlines()[-1])
            found.append(row)
            print("memory:", row, flush=True)
            keep(memory=found)


def operations(device: str, toy: bool, end: float, keep: Keep) -> None:
    """Forward and backward of each operation on each face, at the sizes of ``benchmarks/ops.py``;
    half precision first."""
    from ops import DTYPES, prepare

    from pyllm.testing import OPERATIONS

    names = ["fp32"] if toy else ["fp16", "fp32"]
    if device == "cuda" and torch.cuda.is_bf16_supported(False):
        names.append("bf16")
    found: list[Row] = []
    left_out = []
    for name in names:
        for operation in OPERATIONS.values():
            bench = {"tiny": operation.tiny} if toy else operation.bench
            for label, sizes in bench.items():
                if time.monotonic() > end and found:
                    left_out.append(f"{operation.name} {label} {name}")
                    continue
                case = operation.case(sizes)
                row: Row = {"op": case.op, "name": label, "dtype": name, "sizes": dict(case.sizes)}
                try:
                    forward, backward, row["rows"] = prepare(case, DTYPES[name], device)
                    flops, moved = operation.work(case.sizes, DTYPES[name].itemsize)
                    for stage, functions in (("forward", forward), ("backward", backward)):
                        for timing in timed(functions, device, 0.01 if toy else 0.05):
                            timing = {"stage": stage, "face": timing.pop("name"), **timing}
                            if stage == "forward" and "median" in timing:
                                timing["bytes_per_second"] = moved / timing["median"]
                                timing["flops_per_second"] = flops / timing["median"]
                            row["rows"].append(timing)
                except Exception as error:  # one that fails must not cost the others' figures
                    row["error"] = reason_of(error)
                found.append(row)
                print("operation:", row, flush=True)
                keep(operations=found)
    keep(operations_left_out=left_out)
