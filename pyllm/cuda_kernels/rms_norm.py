"""RMSNorm in CUDA C++: ``csrc/cuda/rms_norm.cu``. The same bits every time."""

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.reference._precision import accumulation_dtype

MOST_BLOCKS = 512
"""At most this many partial sums of dweight: a few for every multiprocessor of any card."""


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.rms_norm.rms_norm_forward`."""
    code, wide = dtype_code("rms_norm", x.dtype), accumulation_dtype(x.dtype)
    x, weight = ready(x), ready(weight, wide)
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=wide)
    launch("rms_norm_forward", code, x, weight, eps, y, rstd, rstd.numel(), x.shape[-1])
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.rms_norm.rms_norm_backward`."""
    code, wide = dtype_code("rms_norm", x.dtype), accumulation_dtype(x.dtype)
    dy, x, rstd, weight_wide = ready(dy, x.dtype), ready(x), ready(rstd, wide), ready(weight, wide)
    rows, width = rstd.numel(), x.shape[-1]
    rows_per_block = max(-(-rows // MOST_BLOCKS), 1)
    dx, dweight, means = torch.empty_like(x), torch.empty_like(weight_wide), torch.empty_like(rstd)
    partials = rstd.new_empty(-(-rows // rows_per_block), width)
    launch(
        "rms_norm_backward",
        code,
        dy,
        x,
        weight_wide,
        rstd,
        dx,
        dweight,
        means,
        partials,
        rows,
        width,
        rows_per_block,
    )
    return dx, dweight.to(weight.dtype)
