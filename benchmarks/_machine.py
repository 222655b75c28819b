"""What every benchmark writes: the machine, the software, the commit, medians and quartiles."""

import json
import os
import platform
import statistics
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10
        )
    except OSError:
        return ""
    return result.stdout.strip()


def commit() -> str:
    """The commit that is checked out, with ``+changes`` if files differ from it."""
    name = _git("rev-parse", "--short=12", "HEAD")
    if not name:
        return "unknown"
    return name + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def card() -> str | None:
    """The name of the CUDA card, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def describe() -> dict[str, Any]:
    """Machine, versions and commit, ready for JSON."""
    import torch

    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "card": card(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_results(name: str, content: dict[str, Any]) -> Path:
    """Write ``{"machine": ..., **content}`` to ``benchmarks/results/<name>-<date>.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    machine = describe()
    path = RESULTS / f"{name}-{machine['date']}.json"
    text = json.dumps({"machine": machine, **content}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in seconds."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "calls": len(times)}
