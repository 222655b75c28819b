"""How much memory there is, and a refusal of what does not fit before it is asked for."""

from __future__ import annotations

import os
import re
from pathlib import Path

GB = 10**9

# What an allocation that failed is called in a RuntimeError of torch or of a library under it; on a
# GPU it has a type, which cannot be named here without importing torch.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Did memory run out, of the machine or of a GPU?"""
    if isinstance(error, RuntimeError):
        named = type(error).__name__ == "OutOfMemoryError"
        return named or _OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or its container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def check_memory(what: str, needed_bytes: int, remedy: str) -> None:
    """What needs more than the machine has would end in the system killing the process.

    Raises:
        ValueError: it needs more; ``remedy`` says what to do.
    """
    total = memory_bytes()
    if total is not None and needed_bytes > total:
        raise ValueError(
            f"{what} takes {needed_bytes / GB:,.1f} GB of memory, and this machine has "
            f"{total / GB:,.1f} GB; {remedy}"
        )
