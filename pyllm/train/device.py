"""What suits this machine: precision, threads, and how fast its matrix products are."""

import ctypes
import gc
import time
from contextlib import AbstractContextManager, nullcontext

import torch

from pyllm.models import choose_device as choose_device
from pyllm.models import named_dtype
from pyllm.train.config import TrainConfig


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 where the hardware has it, float16 on older GPUs, else float32."""
    if wanted != "auto":
        return named_dtype(wanted)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device.type == "cpu" and _cpu_has_bfloat16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bfloat16() -> bool:
    # Without AVX512-BF16 (or AMX, which implies it) oneDNN widens bfloat16 first: slower than
    # float32, not faster.
    return bool(torch.cpu._is_avx512_bf16_supported())


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Names of malloc.h."""


def keep_freed_memory() -> bool:
    """Ask malloc to keep what is freed for the next allocation; is that possible here (glibc)?

    Each step frees its gradients and activations. By default glibc hands all blocks of 32 MB and
    more back to the system, which has to map, clear and count every page of them anew: 230,000
    page faults in a step of ``moe-158m``, a fifth to a third of its time. Kept, there are none; the
    process grows by a few percent. Holds for the whole process, and cannot be undone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def free_memory(device: torch.device) -> int | None:
    """Bytes that PyTorch may still take of a CUDA device; None of others, which are not asked."""
    if device.type != "cuda":
        return None
    # Of "cuda" alone PyTorch does not tell the share.
    card = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(card)
    cap = torch.cuda.get_per_process_memory_fraction(card) * total
    return max(min(free, int(cap) - torch.cuda.memory_reserved(card)), 0)


def give_back_memory(device: torch.device) -> None:
    """Let go of what PyTorch keeps of a device's memory for later: pieces of the wrong size."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in ``dtype``; nothing to do for float32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of five: what ``mfu`` is a share of.

    (Model FLOPs utilisation, PaLM, arXiv:2204.02311, appendix B, but against the measured rather
    than the advertised peak.) In float16 on most CPUs six such products take a minute, so there a
    smaller one is timed.
    """
    if (device.type, dtype) == ("cpu", torch.float16):
        size = min(size, 256)
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        elif device.type == "mps":
            torch.mps.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def apply_threads(config: TrainConfig) -> None:
    """Set the number of CPU threads of this process, if one was asked for."""
    if config.threads:
        torch.set_num_threads(config.threads)
