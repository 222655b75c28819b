"""Combine in CUDA C++: ``csrc/cuda/moe_combine.cu``. The same bits every time.

A position out of range is no error here, which would mean to wait for the card: its token is NaN.
"""

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.cuda_kernels._routing import as_index, sum_rows
from pyllm.reference._precision import accumulation_dtype


def moe_combine_forward(y_RD: Tensor, weights_NA: Tensor, position_NA: Tensor) -> Tensor:
    """See :func:`pyllm.reference.moe_combine.moe_combine_forward`."""
    weights_wide = ready(weights_NA, accumulation_dtype(y_RD.dtype))
    return sum_rows("moe_combine", y_RD, weights_wide, position_NA)


def moe_combine_backward(
    dy_ND: Tensor, y_RD: Tensor, weights_NA: Tensor, position_NA: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_combine.moe_combine_backward`."""
    code, wide = dtype_code("moe_combine", y_RD.dtype), accumulation_dtype(y_RD.dtype)
    dy_ND, y_RD, weights_wide = ready(dy_ND, y_RD.dtype), ready(y_RD), ready(weights_NA, wide)
    position_NA = as_index(position_NA, y_RD.shape[0])
    dy_RD, dweights_NA = torch.empty_like(y_RD), torch.empty_like(weights_wide)
    launch(
        "moe_combine_backward",
        code,
        dy_ND,
        y_RD,
        weights_wide,
        position_NA,
        dy_RD,
        dweights_NA,
        *position_NA.shape,
        y_RD.shape[1],
    )
    return dy_RD, dweights_NA.to(weights_NA.dtype)
