"""Rotary position embedding in C++: ``csrc/cpu/rope.cpp``."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import dtype_code, extension, ready
from pyllm.reference._precision import accumulation_dtype


def _turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    code, wide = dtype_code("rope", x_BTHK.dtype), accumulation_dtype(x_BTHK.dtype)
    batch, n_tokens, n_heads, head_dim = x_BTHK.shape
    if head_dim and x_BTHK.stride(-1) != 1:  # heads cut out of a wider row need no copy
        x_BTHK = x_BTHK.contiguous()
    cos, sin = ready(cos, wide), ready(sin, wide)
    y_BTHK = x_BTHK.new_empty(x_BTHK.shape)
    extension().rope(
        code,
        inverse,
        x_BTHK.data_ptr(),
        *x_BTHK.stride()[:3],
        cos.data_ptr(),
        sin.data_ptr(),
        n_tokens * (head_dim // 2) if cos.dim() == 3 else 0,
        y_BTHK.data_ptr(),
        batch,
        n_tokens,
        n_heads,
        head_dim // 2,
        torch.get_num_threads(),
    )
    return y_BTHK


def rope_forward(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`pyllm.reference.rope.rope_forward`."""
    return _turn(x_BTHK, cos, sin, inverse=False)


def rope_backward(dy_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`pyllm.reference.rope.rope_backward`."""
    return _turn(dy_BTHK, cos, sin, inverse=True)
