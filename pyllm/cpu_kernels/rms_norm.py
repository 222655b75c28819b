"""RMSNorm in C++: ``csrc/cpu/rms_norm.cpp``. Bitwise the same on any number of threads."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import dtype_code, extension, ready
from pyllm.reference._precision import accumulation_dtype


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.rms_norm.rms_norm_forward`."""
    width = x.shape[-1]
    code, wide = dtype_code("rms_norm", x.dtype), accumulation_dtype(x.dtype)
    x, weight = x.contiguous(), ready(weight, wide)
    y = torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=wide)
    extension().rms_norm_forward(
        code,
        x.data_ptr(),
        weight.data_ptr(),
        eps,
        y.data_ptr(),
        rstd.data_ptr(),
        rstd.numel(),
        width,
        torch.get_num_threads(),
    )
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.rms_norm.rms_norm_backward`."""
    width = x.shape[-1]
    code, wide = dtype_code("rms_norm", x.dtype), accumulation_dtype(x.dtype)
    dy, x, rstd = ready(dy, x.dtype), x.contiguous(), ready(rstd, wide)
    weight_wide = ready(weight, wide)
    dx = torch.empty_like(x)
    dweight = torch.empty_like(weight_wide)
    extension().rms_norm_backward(
        code,
        dy.data_ptr(),
        x.data_ptr(),
        weight_wide.data_ptr(),
        rstd.data_ptr(),
        dx.data_ptr(),
        dweight.data_ptr(),
        rstd.numel(),
        width,
        torch.get_num_threads(),
    )
    return dx, dweight.to(weight.dtype)
