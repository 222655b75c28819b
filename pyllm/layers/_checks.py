"""Checks that several layers make of what they are built from and given."""

import torch
from torch import Tensor

from pyllm._checks import check_size
from pyllm._memory import check_memory

LARGEST_SIZE = 2**31 - 1
"""The kernels count in int32."""
MAX_NUMBERS = 10**13
"""Ten times the largest published model; beyond, a tensor's size in bytes would leave int64."""


def check_sizes(layer: str, **sizes: int) -> list[int]:
    """Every size is a whole number from 1 to what int32 holds; NumPy's become Python's."""
    return [check_size(f"{layer}: {name}", size, 1, LARGEST_SIZE) for name, size in sizes.items()]


def check_fits(what: str, weights: int, table: int, remedy: str) -> None:
    """So many weights, and so many numbers in a table of positions, go into the memory.

    Asked before the first tensor is made: a system out of memory kills without a word.
    """
    if weights + table > MAX_NUMBERS:
        raise ValueError(f"{what} is larger than any; expected at most {MAX_NUMBERS:,} numbers")
    probe = torch.empty(0)
    if type(probe) is Tensor and probe.device.type == "cpu":  # neither meta nor fake
        # Made in float64, a table takes 24 bytes a number.
        check_memory(what, probe.element_size() * weights + 24 * table, remedy)


def check_input(layer: str, x: Tensor, width: int, dims: int | None = None) -> None:
    """``x`` is a floating-point tensor whose last size is ``width``, of ``dims`` sizes in all."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{layer}: x must be a floating-point tensor, got {given}")
    if x.dim() == 0 or x.shape[-1] != width or dims not in (None, x.dim()):
        wanted = f"(B, T, {width})" if dims == 3 else f"(..., {width})"
        raise ValueError(f"{layer}: x must have shape {wanted}, got {tuple(x.shape)}")
