"""The device and the dtype that are meant by a name."""

import re
from collections.abc import Mapping

import torch

from pyllm._checks import shown

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

INT8 = "int8"
WEIGHT_DTYPES = {**DTYPES, INT8: torch.int8}
"""What a model can be loaded as; one with int8 weights has float32 activations and norms."""


def available_devices() -> list[str]:
    """What this machine has, the fastest first: ``cuda:0`` ..., ``mps``, ``cpu``."""
    found = []
    if torch.cuda.is_available():
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def choose_device(name: str = "auto") -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto``: cuda, then mps, then cpu.

    Raises:
        ValueError: unknown, or not on this machine.
    """
    here = available_devices()
    if name == "auto":
        return torch.device(here[0].partition(":")[0])
    # torch.device itself would take "cuda:300" for cuda:44: it counts modulo 256.
    if not isinstance(name, str) or not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9][0-9]*))?", name):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:1 or mps, got {shown(name)}")
    if name not in here and name not in {other.partition(":")[0] for other in here}:
        raise ValueError(
            f"device {shown(name)} is not available on this machine; here: {', '.join(here)}; "
            "auto takes the first of these"
        )
    return torch.device(name)


def named_dtype(name: str, known: Mapping[str, torch.dtype] = DTYPES) -> torch.dtype:
    """One of ``known``, by default ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ValueError: another name.
    """
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {shown(name)}")
    return known[name]
