"""Dispatch in C++: ``csrc/cpu/moe_dispatch.cpp``. Bitwise the same on any number of threads."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import ready
from pyllm.cpu_kernels._routing import gather_rows, sort_by_expert, sum_rows


def moe_dispatch_forward(
    x_ND: Tensor, experts_NA: Tensor, n_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_dispatch.moe_dispatch_forward`."""
    order_R, position_NA, offsets_E1 = sort_by_expert(experts_NA, n_experts)
    x_RD = x_ND.new_empty(order_R.shape[0], x_ND.shape[1])
    gather_rows(x_ND.contiguous(), order_R, experts_NA.shape[1], x_RD)
    return x_RD, order_R, position_NA, offsets_E1


def moe_dispatch_backward(dx_RD: Tensor, position_NA: Tensor) -> Tensor:
    """See :func:`pyllm.reference.moe_dispatch.moe_dispatch_backward`."""
    return sum_rows("moe_dispatch", dx_RD.contiguous(), None, ready(position_NA, torch.int32))
