"""What is installed, what runs here, what this machine can train, and what to do about the rest.

``python -m pyllm.doctor`` or ``python scripts/doctor.py``. It only looks; it exits with 0 whatever
it finds.
"""

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyllm._cli import run
from pyllm._memory import memory_bytes
from pyllm._native import (
    build_output,
    cpu_extension,
    cuda_build_output,
    cuda_extension,
    cuda_missing_reason,
    missing_reason,
)

if TYPE_CHECKING:
    import torch

GIB = 2**30
# AdamW in float32: weight, gradient and two moments, four bytes each.
BYTES_PER_PARAMETER = 16
# bf16 counts as fast where its matmul is not slower than this share of float32's speed.
FAST_RATIO = 1.1

_OPTIONAL_PACKAGES = {
    "triton": "the triton face; Linux only: pip install triton",
    "pytest": "the tests: pip install -e '.[test]'",
    "ruff": "scripts/check.py: pip install -e '.[test]'",
    "mypy": "scripts/check.py: pip install -e '.[test]'",
    "clang-format": "scripts/check.py: pip install -e '.[test]'",
    "gguf": "scripts/export.py --to gguf: pip install gguf",
    "transformers": "the tests, which read exported models with it: pip install -e '.[test]'",
    "llama-cpp-python": "benchmarks/llama_cpp_equal.py: pip install -e '.[bench]'",
}
_REQUIRED_PACKAGES = (
    "numpy",
    "tokenizers",
    "safetensors",
    "tyro",
    "rich",
    "tensorboard",
    "matplotlib",
    "datasets",
    "jinja2",
)


@dataclass(frozen=True)
class Finding:
    """One row: what was looked at, what was found, and what to do where that is not enough."""

    item: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Fit:
    """Whether training a preset fits: ``needed_bytes`` for weights, gradients and AdamW's state."""

    preset: str
    parameters: int
    needed_bytes: int
    fits: bool


def what_fits(memory_bytes: int) -> list[Fit]:
    """Which presets AdamW in float32 can train in ``memory_bytes``.

    An estimate: 16 bytes per parameter; the activations come on top and depend on the batch.

    Raises:
        ValueError: ``memory_bytes`` is negative.
    """
    if memory_bytes < 0:
        raise ValueError(f"memory_bytes must be 0 or more, got {memory_bytes}")
    from pyllm.models import PRESETS, count_parameters

    fits = []
    for name, config in PRESETS.items():
        parameters = count_parameters(config).total
        needed = BYTES_PER_PARAMETER * parameters
        fits.append(Fit(name, parameters, needed, needed <= memory_bytes))
    return fits


def cpu_model() -> str:
    """The processor's name as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def openmp_runtimes() -> list[str] | None:
    """Paths of the OpenMP runtimes mapped into this process; None where that cannot be seen."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    paths = set(re.findall(r"\s(/.*/lib[gi]?omp[^/\n]*)$", maps, re.MULTILINE))
    return sorted(paths)


def bf16_speedup(device: "torch.device") -> float:
    """How many times as fast a 512 x 512 matmul is in bfloat16 as in float32 on ``device``."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(512, 512, device=device).to(dtype)
        best = float("inf")
        for _ in range(6):  # the first ones warm up
            start = time.perf_counter()
            # The read at the end waits for the device.
            (a @ a)[0, 0].item()
            best = min(best, time.perf_counter() - start)
        return best

    return seconds(torch.float32) / seconds(torch.bfloat16)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> list[Finding]:
    """Python, the system, the processor and its memory."""
    total = memory_bytes()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("Python", platform.python_version()),
        Finding("system", platform.platform()),
        Finding("processor", f"{cpu_model()}, {usable} cores usable"),
        Finding("memory", "unknown" if total is None else f"{total / GIB:.1f} GiB"),
    ]


def kernels() -> list[Finding]:
    """The compiled extension: instruction sets, OpenMP; and the faces of each operation."""
    extension = cpu_extension()
    if extension is None:
        reason = missing_reason() or "it does not load"
        found = [
            Finding(
                "C++ kernels",
                f"missing: {reason}",
                "install a C++ compiler, then run `pip install -e .` again",
            )
        ]
        output = build_output()
        if output is not None:
            found.append(Finding("build output", output))
    else:
        active = f"active {extension.active_isa()}"
        found = [
            Finding("C++ kernels", "pyllm._cpu is built"),
            Finding(
                "instruction sets",
                f"built {', '.join(extension.built_isas())}; "
                f"supported here {', '.join(extension.supported_isas())}; {active}",
                "PYLLM_ISA=baseline (or another one) forces one",
            ),
            Finding("parallel loops", extension.parallel_backend()),
        ]
    # What brings the runtime; cpu_extension() has imported it only where there is an extension.
    import torch  # noqa: F401

    runtimes = openmp_runtimes()
    if runtimes is not None:
        remedy = "two runtimes fight for the cores; see which package brings the second"
        found.append(
            Finding(
                "OpenMP runtime", "\n".join(runtimes) or "none", remedy if len(runtimes) > 1 else ""
            )
        )
    return found + _cuda_kernels() + _faces()


def _cuda_kernels() -> list[Finding]:
    extension = cuda_extension()
    if extension is not None:
        where = "compiled for the CPU, for tests" if extension.ON_CPU else "pyllm._cuda is built"
        obstacle = "" if extension.ON_CPU else extension.obstacle()
        return [Finding("CUDA kernels", where + (f", but: {obstacle}" if obstacle else ""))]
    remedy = "with nvcc on PATH: `pip install -e .`; where there is no card, PYLLM_CUDA=1 before it"
    found = [Finding("CUDA kernels", f"missing: {cuda_missing_reason()}", remedy)]
    output = cuda_build_output()
    return found if output is None else [*found, Finding("its build's output", output)]


def _faces() -> list[Finding]:
    """Those that serve a device of this machine."""
    import torch

    from pyllm.ops import available_faces
    from pyllm.ops._registry import PREFERENCES, serves

    kinds = ["cpu", *["cuda"] * torch.cuda.is_available()]
    return [
        Finding(
            f"faces of {op}",
            ", ".join(
                face
                for face in available_faces(op)
                if any(serves(op, face, device) for device in kinds)
            ),
        )
        for op in sorted(PREFERENCES)
    ]


def devices() -> list[Finding]:
    """PyTorch's devices with their memory, and whether bf16 is fast on each."""
    import torch

    found = [Finding("PyTorch", torch.__version__)]
    usable = [torch.device("cpu")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            usable.append(torch.device("cuda", index))
            memory = f"{card.total_memory / GIB:.1f} GiB"
            capability = f"compute {card.major}.{card.minor}"
            found.append(Finding(f"cuda:{index}", f"{card.name}, {memory}, {capability}"))
    else:
        remedy = "with an NVIDIA card: install PyTorch's CUDA build from pytorch.org"
        found.append(Finding("cuda", "none", remedy))
    if torch.backends.mps.is_available():
        usable.append(torch.device("mps"))
        found.append(Finding("mps", "available; shares the machine's memory"))
    for device in usable:
        ratio = bf16_speedup(device)
        verdict = "fast" if ratio >= FAST_RATIO else "not faster"
        found.append(
            Finding(f"bf16 on {device}", f"{verdict}: {ratio:.1f} x the speed of float32 (matmul)")
        )
    return found


def packages() -> list[Finding]:
    """Versions of what pyllm needs and of what it can use."""
    found = []
    for name in _REQUIRED_PACKAGES:
        version = _version(name)
        found.append(
            Finding(name, version or "missing", "" if version else "needed: pip install -e .")
        )
    for name, purpose in _OPTIONAL_PACKAGES.items():
        version = _version(name)
        found.append(Finding(name, version or "not installed", "" if version else purpose))
    return found


def eight_bit_optimizer() -> Finding:
    """Whether bitsandbytes works here, by a step of its AdamW on the device that would train."""
    import torch

    from pyllm.train.adamw8bit import LEAST, make_adamw8bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    remedy = "for --train.optimizer adamw8bit: pip install 'pyllm[gpu]'"
    try:
        weight = torch.nn.Parameter(torch.zeros(LEAST, device=device))
        weight.grad = torch.ones_like(weight)
        make_adamw8bit([weight], lr=1.0).step()
        works = bool((weight < 0).all())
    except Exception as error:  # its native parts raise whatever they like
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return Finding(
            "8-bit optimizer", f"bitsandbytes is not usable on {device}: {reason}", remedy
        )
    version = _version("bitsandbytes") or "of unknown version"
    if not works:
        found = f"bitsandbytes {version} runs on {device} and computes nothing"
        return Finding("8-bit optimizer", found, "another version of it, for this card and CUDA")
    return Finding("8-bit optimizer", f"bitsandbytes {version} is usable on {device}")


def training() -> list[Finding]:
    """What this machine can train, on its largest device."""
    import torch

    if torch.cuda.is_available():
        where, total = "cuda:0", torch.cuda.get_device_properties(0).total_memory
    else:
        where, total = "memory", memory_bytes() or 0
    found = []
    for fit in what_fits(total):
        verdict = "yes" if fit.fits else "no"
        found.append(
            Finding(
                fit.preset,
                f"{verdict}: {fit.parameters / 1e6:,.1f} M parameters, AdamW in float32 takes "
                f"{fit.needed_bytes / GIB:.2f} GiB of {total / GIB:.1f} GiB ({where}), "
                "activations not counted",
                "" if fit.fits else "a smaller preset, or a device with more memory",
            )
        )
    return [*found, eight_bit_optimizer()]


SECTIONS: dict[str, Callable[[], list[Finding]]] = {
    "machine": machine,
    "kernels": kernels,
    "PyTorch and devices": devices,
    "packages": packages,
    "what it can train": training,
}


@dataclass(frozen=True)
class Config:
    """What is installed, what runs here, what this machine can train, what to do about the rest."""


def main(config: Config | None = None) -> None:
    """Print every section. One that cannot be looked at says why, and the others still come."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for title, look in SECTIONS.items():
        try:
            findings = look()
        except Exception as error:  # a broken machine is what a doctor is called for
            findings = [Finding("could not look", f"{type(error).__name__}: {error}")]
        table = Table(title=title, title_justify="left", expand=False)
        table.add_column("item", no_wrap=True)
        table.add_column("found", overflow="fold")
        table.add_column("what to do", overflow="fold")
        for finding in findings:
            # Text, not str: a path with brackets in it is not markup.
            table.add_row(Text(finding.item), Text(finding.found), Text(finding.remedy))
        console.print(table)


if __name__ == "__main__":
    run(main, Config)
