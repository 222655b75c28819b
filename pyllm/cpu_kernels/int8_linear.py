"""A linear layer with int8 weights in C++: ``csrc/cpu/int8_linear.cpp``.

Bitwise the same on any number of threads. Sums of int8 products are exact, so that instruction sets
differ by the rounding of the result only.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import dtype_code, extension, ready
from pyllm.reference._precision import LARGEST_INT8_WIDTH, accumulation_dtype


def int8_linear_plain(
    x_ND: Tensor, weight_FD: Tensor, weight_scale_F: Tensor, quantize_input: bool
) -> Tensor | None:
    """The same in one native call, for contiguous tensors on the CPU of exactly the class
    ``Tensor``, with shapes and dtypes that fit; None for anything else.

    One row of 512 is 4 microseconds of work, as much as asking the tensors for their shapes and
    addresses from here.
    """
    return _native()(x_ND, weight_FD, weight_scale_F, quantize_input, torch.get_num_threads())


@cache
def _native() -> Callable[..., Tensor | None]:
    found: Callable[..., Tensor | None] = extension().Int8Linear(
        Tensor, torch.empty, LARGEST_INT8_WIDTH
    )
    return found


def int8_linear_forward(
    x_ND: Tensor, weight_FD: Tensor, weight_scale_F: Tensor, quantize_input: bool
) -> Tensor:
    """See :func:`pyllm.reference.int8_linear.int8_linear_forward`."""
    y_NF = int8_linear_plain(x_ND, weight_FD, weight_scale_F, quantize_input)
    if y_NF is not None:
        return y_NF
    code, wide = dtype_code("int8_linear", x_ND.dtype), accumulation_dtype(x_ND.dtype)
    n_rows, width = x_ND.shape
    n_features = weight_FD.shape[0]
    x_ND, weight_FD = x_ND.contiguous(), weight_FD.contiguous()
    weight_scale_F = ready(weight_scale_F, wide)
    y_NF = x_ND.new_empty((n_rows, n_features))
    extension().int8_linear(
        code,
        quantize_input,
        x_ND.data_ptr(),
        weight_FD.data_ptr(),
        weight_scale_F.data_ptr(),
        y_NF.data_ptr(),
        n_rows,
        n_features,
        width,
        torch.get_num_threads(),
    )
    return y_NF
