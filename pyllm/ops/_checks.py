"""Checks that every door makes: one line that says what was given and what was expected."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from pyllm._checks import shown
from pyllm.cpu_kernels._launch import require_range

FLOATING_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = torch.finfo(torch.float64).max
MAY_BE_EMPTY = ("N", "B", "T", "S")
"""Shape letters of which there may be none: rows. A width of 0 is a mistake."""


def check_floating(op: str, **tensors: Tensor) -> None:
    """Every tensor is dense, in one of the four dtypes that every face knows."""
    for name, tensor in tensors.items():
        check_dense(op, name, tensor)
        if tensor.dtype not in FLOATING_DTYPES:
            raise ValueError(
                f"{op}: {name} must be floating point (float32, float64, bfloat16 or float16), "
                f"got {tensor.dtype}"
            )


def check_integer(op: str, **tensors: Tensor) -> None:
    """Every tensor is dense, int32 or int64."""
    for name, tensor in tensors.items():
        check_dense(op, name, tensor)
        if tensor.dtype not in INDEX_DTYPES:
            raise ValueError(f"{op}: {name} must be int32 or int64, got {tensor.dtype}")


def check_dense(op: str, name: str, tensor: Any) -> None:
    """A tensor with a stride for each dimension: neither sparse nor nested."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor, got {shown(tensor)}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ValueError(
            f"{op}: {name} must be a dense tensor, got layout {tensor.layout}; call to_dense()"
        )


def check_whole(op: str, name: str, value: Any, least: int, most: int = LARGEST_INT) -> int:
    """A whole number in a range: an int, NumPy's, or torch.compile's symbol of one."""
    whole = isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)
    if not whole or not least <= value <= most:
        allowed = f"of at least {least}" if most == LARGEST_INT else f"from {least} to {most}"
        raise ValueError(f"{op}: {name} must be a whole number {allowed}, got {shown(value)}")
    # A symbol stays one: int() of it would tie the compiled graph to this size.
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]


def check_real(op: str, name: str, value: Any, least: float = -math.inf) -> float:
    """A finite number of at least ``least``."""
    number = value
    if isinstance(value, Real) and not isinstance(value, (bool, float, torch.SymFloat)):
        try:
            number = float(value)
        except OverflowError:  # an integer of more than 308 digits
            number = math.inf
    real = isinstance(number, (float, torch.SymFloat))
    # A NaN is not at least anything.
    if not real or not (least <= number and abs(number) <= LARGEST_FLOAT):
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{op}: {name} must be a finite number{bound}, got {shown(value)}")
    return number


def check_flag(op: str, name: str, value: Any) -> None:
    """True or False; numbers and strings, which are true or false as well, are mistakes."""
    if not isinstance(value, bool):
        raise ValueError(f"{op}: {name} must be True or False, got {shown(value)}")


def check_same_dtype(op: str, **tensors: Tensor) -> None:
    """All tensors share one dtype."""
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        given = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ValueError(f"{op}: one dtype was expected for all of its inputs, got {given}")


def check_same_device(op: str, **tensors: Tensor) -> None:
    """All tensors live on one device."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        given = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{op}: one device was expected for all of its inputs, got {given}")


def check_shape(op: str, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """``tensor`` has the expected shape; a letter in ``expected`` stands for any size.

    Only rows (``MAY_BE_EMPTY``) can be none.
    """
    shape = tensor.shape
    if len(shape) == len(expected):
        for want, have in zip(expected, shape, strict=True):
            if isinstance(want, str):
                if have == 0 and want not in MAY_BE_EMPTY:
                    break
            elif want != have:
                break
        else:
            return
    # Only here: torch.compile cannot turn a symbolic size into text on the path that goes on.
    wanted = ", ".join(str(size) for size in expected)
    widths = [size for size in expected if isinstance(size, str) and size not in MAY_BE_EMPTY]
    least = f" with {', '.join(widths)} of at least 1" if 0 in shape and widths else ""
    raise ValueError(f"{op}: {name} must have shape ({wanted}){least}, got {tuple(shape)}")


def check_index_range(
    op: str, name: str, indices: Tensor, limit: int, ignore_index: int | None = None
) -> None:
    """Every index is in ``[0, limit)`` or equals ``ignore_index``.

    Checked on the CPU only: elsewhere reading the values would wait for the device, and fake and
    compiled tensors have none.
    """
    if is_readable(indices):
        require_range(op, name, indices, limit, ignore_index)


def is_readable(indices: Tensor) -> bool:
    """Are there values to look at, on the CPU and now?"""
    if torch.compiler.is_compiling() or type(indices) is not Tensor:
        return False
    return indices.device.type == "cpu" and indices.numel() > 0


def check_row_count(op: str, name: str, indices: Tensor) -> None:
    """The rows of all experts are numbered in int32."""
    if indices.numel() >= 2**31:
        raise ValueError(
            f"{op}: {name} must name less than 2**31 rows, got {tuple(indices.shape)}; split the "
            "tokens"
        )


def check_permutation(op: str, name: str, indices: Tensor) -> None:
    """Every number from 0 to the number of entries less one occurs once. On the CPU only, too."""
    if not is_readable(indices):
        return
    counts = torch.bincount(indices.reshape(-1), minlength=indices.numel())
    if int(counts.max()) > 1:
        raise ValueError(
            f"{op}: {name} must be a permutation, got {int(counts.argmax())} "
            f"{int(counts.max())} times"
        )


def check_inference(op: str, why: str, **tensors: Tensor) -> None:
    """No gradient is expected: it would stop here without a word."""
    if not torch.is_grad_enabled():
        return
    wanting = [name for name, tensor in tensors.items() if tensor.requires_grad]
    if wanting:
        raise ValueError(
            f"{op}: {why}, got {', '.join(wanting)} that require one; call it under "
            "torch.no_grad() or torch.inference_mode()"
        )
