"""The memory of a training step: what is estimated, beside what is allocated.

    python benchmarks/train_memory.py

Each case takes a step on the CPU, in a process of its own, while PyTorch's profiler counts the
allocator's bytes, and estimates the same step without numbers. Writes
``benchmarks/results/train-memory-<date>.json`` after each case.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pyllm._checks import check_size
from pyllm._cli import require_writable, run

CHILD = """
import json, sys
from dataclasses import asdict
import torch
from pyllm.models import named_dtype, preset
from pyllm.train import TrainConfig
from pyllm.train.memory import estimate_memory, measure_memory

name, dtype, settings, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
case = preset(name), TrainConfig(**json.loads(settings)), named_dtype(dtype)
estimate = estimate_memory(*case, "cpu")
found = {"estimate": asdict(estimate), "estimated": estimate.total}
print(json.dumps({**found, "measured": measure_memory(*case)}))
"""
DTYPES = {"float32": "float32", "mixed": "bfloat16"}


@dataclass
class Config:
    """Compare estimates of training memory with measurements on the CPU."""

    presets: tuple[str, ...] = ("moe-tiny", "moe-158m", "moe-158m-gpt", "dense-50m")
    """Which models."""
    dtypes: tuple[Literal["float32", "mixed"], ...] = ("float32", "mixed")
    """mixed: float32 weights, bfloat16 products."""
    batch_sizes: tuple[int, ...] = (1, 4)
    """Sequences in a micro-batch; a step has two of them."""
    seq_len: int = 512
    """Tokens in a sequence."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon's products take minutes on a CPU."""
    threads: int = 2
    """CPU threads."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file."""

    def __post_init__(self) -> None:
        for size in self.batch_sizes:
            check_size("each of batch_sizes", size, 1, 2**20)
        check_size("seq_len", self.seq_len, 1, 2**20)
        check_size("threads", self.threads, 1, 1024)


def main(config: Config) -> None:
    """Measure case by case, print, write."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from _record import Record

    require_writable(config.results)
    record = Record(config.results, "train-memory")
    settings = {
        k: v for k, v in asdict(config).items() if k not in ("results", "presets", "dtypes")
    }
    cases: list[dict[str, Any]] = []
    # Models one after the other: a run that is cut has something of each.
    for rows, recompute, dtype, name in product(
        config.batch_sizes, (False, True), config.dtypes, config.presets
    ):
        chosen = {
            "batch_size": rows,
            "accumulation": 2,
            "seq_len": config.seq_len,
            "recompute": recompute,
            "optimizer": config.optimizer,
        }
        words = [name, DTYPES[dtype], json.dumps(chosen), str(config.threads)]
        answer = subprocess.check_output([sys.executable, "-c", CHILD, *words], text=True)
        found = json.loads(answer.splitlines()[-1])
        cases.append({"preset": name, "dtype": dtype, **chosen, **found})
        record.add(settings=settings, cases=cases)
        off = found["estimated"] / found["measured"] - 1
        print(
            f"{name} {dtype} {rows} x {config.seq_len}{' recomputed' if recompute else ''}: "
            f"estimated {found['estimated'] / 2**20:,.0f} MiB, measured "
            f"{found['measured'] / 2**20:,.0f} MiB, {off:+.1%}",
            flush=True,
        )
    print(record.path)


if __name__ == "__main__":
    run(main, Config)
