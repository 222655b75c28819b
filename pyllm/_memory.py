"""How much memory there is, and a refusal of what does not fit before it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

GB = 10**9


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
