"""Checks that every door makes: one line that says what was given and what was expected."""

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)


def check_floating(op: str, **tensors: Tensor) -> None:
    """Every tensor is of a real floating dtype."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")


def check_integer(op: str, **tensors: Tensor) -> None:
    """Every tensor is int32 or int64."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in INDEX_DTYPES:
            raise ValueError(f"{op}: {name} must be int32 or int64, got {tensor.dtype}")


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
    """``tensor`` has the expected shape; a letter in ``expected`` stands for any size."""
    shape = tuple(tensor.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{op}: {name} must have shape ({wanted}), got {shape}")


def check_index_range(
    op: str, name: str, indices: Tensor, limit: int, ignore_index: int | None = None
) -> None:
    """Every index is in ``[0, limit)`` or equals ``ignore_index``.

    Checked on the CPU only: elsewhere reading the values would wait for the device, and fake and
    compiled tensors have none.
    """
    if torch.compiler.is_compiling() or type(indices) is not Tensor:
        return
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    if ignore_index is not None:
        indices = indices.where(indices != ignore_index, 0)
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= limit:
        raise ValueError(
            f"{op}: {name} must be between 0 and {limit - 1}, got values from {low} to {high}"
        )
