"""How much memory writing takes, above what an interpreter with torch imported has.

    python benchmarks/memory.py

A model with random weights is saved, in float32 and in int8, and each is loaded and writes in a
process of its own, which says how far it grew. Writes ``benchmarks/results/memory-<date>.json``.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyllm._checks import check_size
from pyllm._cli import require_writable, run

CHILD = """
import json, sys
import torch

def peak():  # of this process alone, unlike getrusage; Linux
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))

start = peak()
import pyllm
model = pyllm.load(sys.argv[1], dtype=sys.argv[2])
loaded = peak()
text = model.generate("Once upon a time", max_new_tokens=int(sys.argv[3]), greedy=True)
print(json.dumps({"torch": start, "loaded": loaded - start, "peak": peak() - start}))
"""


@dataclass
class Config:
    """Measure the memory of loading and writing."""

    preset: str = "moe-158m"
    """Which model."""
    dtypes: tuple[Literal["int8", "bfloat16", "float32"], ...] = ("int8", "bfloat16", "float32")
    """How it is loaded; int8 from a folder that scripts/quantize.py wrote."""
    tokens: int = 128
    """To write."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file."""

    def __post_init__(self) -> None:
        check_size("tokens", self.tokens, 1, 2**20)


def main(config: Config) -> None:
    """Measure, print, write."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import torch
    from _record import Record

    from pyllm.models import Transformer, preset, quantize_folder, save_model
    from pyllm.tokenizers import byte_tokenizer

    require_writable(config.results)
    record = Record(config.results, "memory")
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        floats, ints = Path(place, "floats"), Path(place, "ints")
        save_model(floats, Transformer(preset(config.preset)), byte_tokenizer())
        quantize_folder(floats, ints)
        for dtype in config.dtypes:
            folder = ints if dtype == "int8" else floats
            command = [sys.executable, "-c", CHILD, str(folder), dtype, str(config.tokens)]
            found = json.loads(subprocess.check_output(command, text=True))
            weights = (folder / "model.safetensors").stat().st_size
            cases.append({"preset": config.preset, "dtype": dtype, "file": weights, **found})
            record.add(tokens=config.tokens, cases=cases)
            print(
                f"{config.preset} {dtype}: {found['peak'] / 1e6:.0f} MB above the "
                f"{found['torch'] / 1e6:.0f} MB of torch; the file has {weights / 1e6:.0f} MB"
            )
    print(record.path)


if __name__ == "__main__":
    run(main, Config)
