"""What the launchers of this folder can hand to Triton's compiler, listed for the tests.

Every ``<op>.py`` here has ``variants(dtype)`` for ``fp32``, ``bf16`` and ``fp16``: each kernel in
each configuration that its launcher may choose, at representative constants. The tests compile all
of them for real cards, without one, and look at shared memory, spills and instructions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyllm.triton_kernels._tuning import Blocks, Kernel

ITEM_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration."""

    name: str
    """Of kernel and configuration, for a report."""
    kernel: Kernel
    signature: dict[str, str]
    """Argument -> Triton's name of its type: ``*fp16``, ``i32``, ``fp32``."""
    constants: dict[str, Any]
    """The ``tl.constexpr`` arguments."""
    num_warps: int = 4
    num_stages: int = 3
    mma: bool = False
    """Whether the PTX must hold a tensor-core instruction."""
    aligned: bool = True
    """Whether pointers (in bytes) and lengths of rows (in elements) are multiples of 16, as Triton
    finds out at a call; only such rows are copied to shared memory in the background
    (``cp.async``)."""
    shared: int = 0
    """Bytes of shared memory below which the launcher does not choose this configuration on a card;
    0: it is chosen on every card."""


def variant(
    name: str,
    kernel: Kernel,
    dtype: str,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    **options: Any,
) -> Variant:
    """A variant whose signature follows from the names of the kernel's arguments.

    ``*_ptr`` points to ``dtype``, unless ``types`` says otherwise, and all else is an ``i32``.
    """
    names = [each for each in kernel.arg_names if each not in constants]
    signature = {
        each: types.get(each, f"*{dtype}" if each.endswith("_ptr") else "i32") for each in names
    }
    known = {each: constants[each] for each in kernel.arg_names if each in constants}
    return Variant(name, kernel, signature, known, **options)


def products(
    name: str,
    kernel: Kernel,
    dtype: str,
    blocks: tuple[Blocks, ...],
    constants: Mapping[str, Any],
    types: Mapping[str, str],
) -> Iterator[Variant]:
    """A kernel with matrix products, in each configuration of its blocks."""
    size = ITEM_SIZES[dtype]
    fixed = {**constants, "DOUBLE": dtype == "fp64", "UPCAST": False}
    for one in blocks:
        yield variant(
            f"{name}-{one.m}x{one.n}x{one.k}-{one.warps}-{one.stages}",
            kernel,
            dtype,
            {**fixed, **one.constants},
            types,
            num_warps=one.warps,
            num_stages=one.stages,
            mma=size == 2,
            shared=one.shared(size),
        )
