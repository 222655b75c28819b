"""Combine in C++: ``csrc/cpu/moe_combine.cpp``. Bitwise the same on any number of threads."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import (
    dtype_code,
    extension,
    ready,
    require_range,
)
from pyllm.cpu_kernels._routing import sum_rows
from pyllm.reference._precision import accumulation_dtype


def moe_combine_forward(y_RD: Tensor, weights_NA: Tensor, position_NA: Tensor) -> Tensor:
    """See :func:`pyllm.reference.moe_combine.moe_combine_forward`."""
    return sum_rows(
        "moe_combine",
        y_RD.contiguous(),
        ready(weights_NA, accumulation_dtype(y_RD.dtype)),
        ready(position_NA, torch.int32),
    )


def moe_combine_backward(
    dy_ND: Tensor, y_RD: Tensor, weights_NA: Tensor, position_NA: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_combine.moe_combine_backward`."""
    code, wide = dtype_code("moe_combine", y_RD.dtype), accumulation_dtype(y_RD.dtype)
    dy_ND, y_RD = ready(dy_ND, y_RD.dtype), y_RD.contiguous()
    weights_wide, position_NA = ready(weights_NA, wide), ready(position_NA, torch.int32)
    require_range("moe_combine", "position", position_NA, y_RD.shape[0])
    dy_RD = torch.empty_like(y_RD)
    dweights_NA = torch.empty_like(weights_wide)
    extension().moe_combine_backward(
        code,
        dy_ND.data_ptr(),
        y_RD.data_ptr(),
        weights_wide.data_ptr(),
        position_NA.data_ptr(),
        dy_RD.data_ptr(),
        dweights_NA.data_ptr(),
        *position_NA.shape,
        y_RD.shape[1],
        torch.get_num_threads(),
    )
    return dy_RD, dweights_NA.to(weights_NA.dtype)
