"""Rotary position embedding in CUDA C++: ``csrc/cuda/rope.cu``."""

from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.reference._precision import accumulation_dtype


def _turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    code, wide = dtype_code("rope", x_BTHK.dtype), accumulation_dtype(x_BTHK.dtype)
    batch, n_tokens, n_heads, head_dim = x_BTHK.shape
    if x_BTHK.stride(-1) != 1:  # heads cut out of a wider row need no copy
        x_BTHK = x_BTHK.contiguous()
    cos, sin = ready(cos, wide), ready(sin, wide)
    y_BTHK = x_BTHK.new_empty(x_BTHK.shape)
    launch(
        "rope",
        code,
        inverse,
        x_BTHK,
        *x_BTHK.stride()[:3],
        cos,
        sin,
        n_tokens * (head_dim // 2) if cos.dim() == 3 else 0,
        y_BTHK,
        batch,
        n_tokens,
        n_heads,
        head_dim // 2,
    )
    return y_BTHK


def rope_forward(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`pyllm.reference.rope.rope_forward`."""
    return _turn(x_BTHK, cos, sin, inverse=False)


def rope_backward(dy_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`pyllm.reference.rope.rope_backward`."""
    return _turn(dy_BTHK, cos, sin, inverse=True)
