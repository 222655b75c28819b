r"""Dispatch: copy each token to the rows of its experts, all rows of an expert side by side.

A stable counting sort of the ``N*A`` choices by expert. Slot ``s = n*A + a`` is choice ``a`` of
token ``n``; ``order`` maps a sorted row to its slot, ``position`` is its inverse, and the rows of
expert ``e`` are ``offsets[e]:offsets[e+1]``. Nothing is padded and no token is dropped.

.. math:: x'_r = x_{\lfloor order_r / A \rfloor}, \qquad dx_n = \textstyle\sum_a dx'_{position_{na}}
"""

import torch
from torch import Tensor

from pyllm.reference._precision import accumulation_dtype


def sort_by_expert(experts_NA: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(order_R, position_NA, offsets_E1)``, all int32."""
    slots_R = experts_NA.reshape(-1).long()
    order_R = slots_R.argsort(stable=True)
    position_R = torch.empty_like(order_R)
    position_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=slots_R.device)
    counts_E.scatter_add_(0, slots_R, torch.ones_like(slots_R))
    offsets_E1 = torch.nn.functional.pad(counts_E.cumsum(0), (1, 0))
    return (
        order_R.to(torch.int32),
        position_R.view_as(experts_NA).to(torch.int32),
        offsets_E1.to(torch.int32),
    )


def moe_dispatch_forward(
    x_ND: Tensor, experts_NA: Tensor, n_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(x_RD, order_R, position_NA, offsets_E1)``; the last three are int32."""
    order_R, position_NA, offsets_E1 = sort_by_expert(experts_NA, n_experts)
    top_k = experts_NA.shape[1]
    return x_ND[order_R.long() // top_k], order_R, position_NA, offsets_E1


def moe_dispatch_backward(dx_RD: Tensor, position_NA: Tensor) -> Tensor:
    """Return ``dx_ND``: each token gathers the gradients of its rows, so no atomics are needed."""
    wide = accumulation_dtype(dx_RD.dtype)
    return dx_RD[position_NA.long()].to(wide).sum(1).to(dx_RD.dtype)
