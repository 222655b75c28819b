"""Everything a GPU can tell in ten minutes, the figures that were promised first.

    python benchmarks/gpu.py

``int8_linear`` beside the bandwidth, decoding of moe-158m beside its floor, the experts beside
``grouped_mm``, ScatterMoE and Liger, attention beside PyTorch's, the memory that writing takes;
then trains moe-158m-gpt on stories with GPT-2's vocabulary under the memory of a small card, times
decoding with it, and at last every operation on every face. Each part is a process of its own: one
that crashes the device, hangs or takes too long loses its own figures only, from the case it was
at. Writes ``benchmarks/results/gpu-<card>-<date>.json`` after each part, with what was promised
beside what was measured, and the parts that were left out and why.

``--part experts`` measures that part alone. ``--device cpu --toy`` runs the same code at toy size;
with ``TRITON_INTERPRET=1 PYLLM_FACE=triton`` the Triton kernels, interpreted.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyllm._checks import check_size, is_finite, shown
from pyllm._cli import require_writable, run

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("PYLLM_SHARED_DATA") or HERE.parents[1] / "shared" / "data")

PARTS = {
    "int8_linear": 60.0,
    "decode_beside_floor": 75.0,
    "experts": 120.0,
    "attention": 120.0,
    "memory": 90.0,
    "training": 600.0,
    "operations": 600.0,
}
"""In this order, and the most seconds each may take."""
STARTING = 15.0
"""Seconds that a part takes at the least: its process, PyTorch and CUDA begin anew."""
ENDING = 10.0
"""Seconds before it is ended in which a part is asked to begin nothing more."""

Keep = Callable[..., None]
"""Keeps what a part has found so far: ``keep(experts=rows)``."""


@dataclass
class Config:
    """Train, decode and time operations on a GPU."""

    data: Path = SHARED / "tinystories" / "train.txt"
    """Text to train on."""
    more_data: Path = SHARED / "stories" / "train.txt"
    """More of it, where there is such a file: the first alone is read through in a minute."""
    valid: Path = SHARED / "tinystories" / "valid.txt"
    """Text to validate on."""
    gpt2_folder: Path = SHARED / "tokenizer"
    """Folder with gpt2_vocab.bpe and gpt2_encoder.json."""
    device: Literal["cuda", "mps", "cpu"] = "cuda"
    """Where to run."""
    minutes: float = 4.0
    """Of training at most; how many steps that is, is found from the first 20."""
    total_minutes: float = 9.3
    """Of everything. A part that is not done by then is ended; training comes after what was
    promised of single operations, and begins early enough for half of its minutes."""
    memory_gib: float = 3.4
    """Most memory PyTorch may allocate on a CUDA device while it trains; the context comes on
    top."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """As in train_moe.py."""
    batch_size: int = 8
    """Sequences in a micro-batch; halved for as long as memory does not suffice."""
    part: Literal[("all", *PARTS)] = "all"
    """Measure this one alone, in this process."""
    toy: bool = False
    """Toy sizes on embedded stories: to see that everything works."""
    results: Path = HERE / "results"
    """Folder of the JSON file."""
    out: str = ""
    """Folder for token files and so on; empty: runs/gpu-<date>-<time>."""

    def __post_init__(self) -> None:
        for name in ("minutes", "total_minutes"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise ValueError(f"{name} must be at least 0, got {shown(value)}")
        if not is_finite(self.memory_gib) or self.memory_gib <= 0:
            raise ValueError(f"memory_gib must be above 0, got {shown(self.memory_gib)}")
        check_size("batch_size", self.batch_size, 1, 2**31 - 1)


def main(config: Config) -> None:
    """Measure part by part."""
    began = time.monotonic()
    sys.path.insert(0, str(HERE))
    from _gpu_targets import beside_targets
    from _record import Record

    from pyllm.models.device import available_devices, choose_device
    from pyllm.train.run import default_folder

    here = available_devices()
    if config.device not in {name.partition(":")[0] for name in here}:
        raise ValueError(
            f"device '{config.device}' is not available on this machine; here: {', '.join(here)}. "
            "--device cpu --toy runs everything at toy size, which measures nothing that was "
            "promised"
        )
    device = choose_device(config.device)
    require_writable(config.results)
    folder = Path(config.out or default_folder("gpu"))
    end = began + config.total_minutes * 60
    apart = device.type == "cuda" and config.part == "all"
    machine, facts = look_apart() if apart else look(device.type)
    card = re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")
    alone = config.part != "all"
    name = f"gpu-{card}{'-toy' if config.toy else ''}{'-' + config.part if alone else ''}"
    record = Record(config.results, name, machine)
    # Names rather than paths: the file is committed, and paths are this machine's own.
    settings = {name: getattr(config, name).name for name in ("data", "more_data", "valid")}
    for name in ("minutes", "total_minutes", "memory_gib", "optimizer", "batch_size", "toy"):
        settings[name] = getattr(config, name)
    record.add(device=facts, settings=settings)
    print(f"device: {facts}")
    content: dict[str, Any] = {"skipped_parts": {}, "seconds": {}, "targets": []}
    order = list(PARTS)
    for part in [config.part] if alone else order:
        started = time.monotonic()
        seconds = min(PARTS[part], end - started)
        if not alone and order.index(part) < order.index("training"):
            seconds = min(seconds, end - config.minutes * 30 - started)
        if not apart:
            content |= run_here(part, config, device, seconds, folder, record.add)
        elif seconds < STARTING:
            content["skipped_parts"][part] = "no time was left"
        else:
            content |= run_apart(part, config, seconds, folder)
        content["seconds"][part] = time.monotonic() - started
        content["targets"] = beside_targets(content, device.type == "cuda" and not config.toy)
        record.add(**content)
    for row in content["targets"]:
        print("target:", row)
    for part, reason in content["skipped_parts"].items():
        print(f"not measured: {part}: {reason}")
    print(record.path)


def look(device: str) -> list[dict[str, Any]]:
    """What is known of this machine, and of the device."""
    import torch
    from _machine import describe

    if device != "cuda":
        return [describe(), {"name": device}]
    properties = torch.cuda.get_device_properties(0)
    facts = {
        "name": properties.name,
        "total_memory": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    return [describe(), facts]


LOOK = """
import json, sys
sys.path.insert(0, sys.argv[1])
import gpu
print(json.dumps(gpu.look(sys.argv[2])))
"""


def look_apart(device: str = "cuda") -> list[dict[str, Any]]:
    """The same, in a process of its own: this one shall take no memory of the card."""
    command = [sys.executable, "-c", LOOK, str(HERE), device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the card cannot be asked: {done.stderr.strip().splitlines()[-1:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_here(
    part: str, config: Config, device: "torch.device", seconds: float, folder: Path, write: Keep
) -> dict[str, Any]:
    """Measure a part in this process; one that fails keeps what it had found."""
    found: dict[str, Any] = {part: None}

    def keep(**more: Any) -> None:
        found.update(more)
        write(**more)

    try:
        measure(part, config, device, time.monotonic() + seconds, folder, keep)
    except Exception as error:
        keep(**{f"{part}_error": f"{type(error).__name__}: {error}"})
        print(part, found[f"{part}_error"], flush=True)
    return found


def run_apart(part: str, config: Config, seconds: float, folder: Path) -> dict[str, Any]:
    """Measure a part in a process of its own, and end it when its seconds are over."""
    with tempfile.TemporaryDirectory() as place:
        told = {field.name: getattr(config, field.name) for field in fields(config)}
        told |= {"part": part, "results": place, "out": folder}
        told["total_minutes"] = max(seconds - ENDING, 1.0) / 60
        toy = ["--toy"] if told.pop("toy") else []
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in told.items()]
        command = [sys.executable, str(Path(__file__).resolve()), *flags, *toy]
        child = subprocess.Popen(command, start_new_session=True)
        try:
            code: int | str = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"ended after {seconds:.0f} s"
        finally:  # Ctrl-C reaches this process alone
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        written = [json.loads(file.read_text("utf-8")) for file in Path(place).glob("*.json")]
    found: dict[str, Any] = {part: None}
    for name, value in (written[0] if written else {}).items():
        if name not in ("machine", "device", "settings", "skipped_parts", "seconds", "targets"):
            found[name] = value
    if code != 0:
        found.setdefault(f"{part}_error", f"its process did not end well: {code}")
        print(part, found[f"{part}_error"], flush=True)
    return found


def measure(
    part: str, config: Config, device: "torch.device", end: float, folder: Path, keep: Keep
) -> None:
    """One part, its results handed to ``keep`` as they come, new cases begun before ``end``."""
    import _gpu_models
    import _gpu_parts
    import _gpu_train

    sized = {"device": device.type, "toy": config.toy, "end": end, "keep": keep}
    calls: dict[str, Callable[[], None]] = {
        "int8_linear": lambda: _gpu_parts.int8_row(**sized),
        "decode_beside_floor": lambda: _gpu_models.decode_beside_floor(**sized),
        "experts": lambda: _gpu_parts.experts(**sized),
        "attention": lambda: _gpu_parts.attention_beside_sdpa(**sized),
        "memory": lambda: _gpu_models.memory(**sized),
        "training": lambda: _gpu_train.train_and_decode(config, device, end, folder, keep),
        "operations": lambda: _gpu_models.operations(**sized),
    }
    calls[part]()


if __name__ == "__main__":
    run(main, Config)
