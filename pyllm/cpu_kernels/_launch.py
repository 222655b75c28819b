"""What every launcher needs: the extension, dtype codes, the type sums are kept in."""

from types import ModuleType

import torch
from torch import Tensor

from pyllm._dtypes import kernel_code
from pyllm._native import cpu_extension


def extension() -> ModuleType:
    """``pyllm._cpu``.

    Raises:
        RuntimeError: the extension was not built.
    """
    module = cpu_extension()
    if module is None:
        raise RuntimeError("the cpu face needs pyllm._cpu, which was not built here")
    return module


def dtype_code(op: str, dtype: torch.dtype) -> int:
    """The kernel's code of a dtype.

    Raises:
        ValueError: the kernels have no such dtype.
    """
    return kernel_code(extension(), "cpu", op, dtype)


def ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` contiguous and in ``dtype``; the tensor itself where it already is."""
    # Asking costs a tenth of what a conversion to the dtype that it has does.
    return (tensor if tensor.dtype is dtype else tensor.to(dtype)).contiguous()


def unit_stride(x: Tensor) -> Tensor:
    """``x`` itself where the channels of a head lie side by side, as copying them whole needs."""
    return x if x.stride(-1) == 1 else x.contiguous()


def require_range(
    op: str, name: str, indices: Tensor, limit: int, ignore_index: int | None = None
) -> None:
    """The kernels index memory with these: each must be in ``[0, limit)`` or ``ignore_index``.

    The doors check as well, but cannot while torch.compile traces them.

    Raises:
        ValueError: one is not.
    """
    if indices.numel() == 0:
        return
    if ignore_index is not None:
        indices = indices.where(indices != ignore_index, 0)
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= limit:
        raise ValueError(
            f"{op}: {name} must be between 0 and {limit - 1}, got values from {low} to {high}"
        )
