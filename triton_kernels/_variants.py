"""What the launchers of this folder can hand to Triton's compiler, listed for the tests.

Every ``<op>.py`` here has ``variants(dtype)`` for ``fp32``, ``bf16`` and ``fp16``: each kernel in
each configuration that its launcher may choose, at representative constants. The tests compile all
of them for real cards, without one, and look at shared memory, spills and instructions.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration."""

    name: str
    """Of kernel and configuration, for a report."""
    kernel: Any
    """The ``triton.JITFunction`` itself, not an autotuner around it."""
    signature: dict[str, str]
    """Argument -> Triton's name of its type: ``*fp16``, ``i32``, ``fp32``."""
    constants: dict[str, Any]
    """The ``tl.constexpr`` arguments."""
    num_warps: int = 4
    num_stages: int = 3
    mma: bool = False
    """Whether the PTX must hold a tensor-core instruction."""
    aligned: tuple[str, ...] = ()
    """Arguments that are multiples of 16: pointers in bytes, sizes in elements. Triton finds out at
    a call; only such rows are copied to shared memory in the background (``cp.async``)."""
    shared: int = 0
    """Bytes of shared memory below which the launcher does not choose this configuration on a card;
    0: it is chosen on every card."""
