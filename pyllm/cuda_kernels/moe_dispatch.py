"""Dispatch in CUDA C++: ``csrc/cuda/moe_dispatch.cu``. The same bits every time.

An expert out of range is no error here, which would mean to wait for the card: its rows come last
and are NaN.
"""

from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.cuda_kernels._routing import sort_by_expert, sum_rows


def moe_dispatch_forward(
    x_ND: Tensor, experts_NA: Tensor, n_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_dispatch.moe_dispatch_forward`."""
    code, x_ND = dtype_code("moe_dispatch", x_ND.dtype), ready(x_ND)
    order_R, position_NA, offsets_E1 = sort_by_expert(experts_NA, n_experts)
    n_rows, width = order_R.shape[0], x_ND.shape[1]
    x_RD = x_ND.new_empty(n_rows, width)
    top_k = experts_NA.shape[1]
    launch("moe_dispatch_gather", code, x_ND, order_R, offsets_E1[-1], x_RD, n_rows, top_k, width)
    return x_RD, order_R, position_NA, offsets_E1


def moe_dispatch_backward(dx_RD: Tensor, position_NA: Tensor) -> Tensor:
    """See :func:`pyllm.reference.moe_dispatch.moe_dispatch_backward`."""
    return sum_rows("moe_dispatch", dx_RD, None, position_NA)
