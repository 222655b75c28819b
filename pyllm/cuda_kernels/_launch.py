"""What every launcher needs: the extension, dtype codes, tensors as kernels want them, the call.

A launcher allocates its results and its scratch memory with torch, so that PyTorch's allocator
owns all of it, and calls the kernels on the tensors' device and torch's current stream. Nothing
here waits for the card.
"""

from types import ModuleType

import torch
from torch import Tensor

from pyllm._dtypes import kernel_code
from pyllm._native import cuda_extension

ALIGNMENT = 16
"""Bytes that kernels load at once."""


def extension() -> ModuleType:
    """``pyllm._cuda``, or the build that ``PYLLM_CUDA_EXTENSION`` names.

    Raises:
        RuntimeError: there is none.
    """
    module = cuda_extension()
    if module is None:
        raise RuntimeError("the cuda face needs pyllm._cuda, which was not built here")
    return module


def dtype_code(op: str, dtype: torch.dtype) -> int:
    """The kernel's code of a dtype.

    Raises:
        ValueError: the kernels have no such dtype.
    """
    return kernel_code(extension(), "cuda", op, dtype)


def ready(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` contiguous, in ``dtype`` and at an address that 16 divides; itself where it is."""
    if dtype is not None and tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def launch(kernel: str, *arguments: Tensor | float | None) -> None:
    """Call a launcher of the extension on the device of its tensors and torch's current stream.

    A tensor is handed over as its address, None as a null pointer, numbers as they are.

    Raises:
        ValueError: the tensors are on several devices, or on one that the extension is not for.
    """
    device: torch.device | None = None
    values: list[float] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if device is None:
                device = argument.device
            elif argument.device != device:
                raise ValueError(
                    f"{kernel}: one device was expected for all tensors, got {device} and "
                    f"{argument.device}"
                )
            values.append(argument.data_ptr())
        else:
            values.append(0 if argument is None else argument)
    native = extension()
    run = getattr(native, kernel)
    expected = "cpu" if native.ON_CPU else "cuda"
    if device is None or device.type != expected:
        raise ValueError(f"{kernel}: tensors on {expected} were expected, got {device}")
    if native.ON_CPU:
        run(*values, 0)
        return
    with torch.cuda.device(device):
        run(*values, torch.cuda.current_stream(device).cuda_stream)
