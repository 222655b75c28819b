"""The expert network in C++ (``csrc/cpu/moe_ffn.cpp``), behind the sort by expert."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import dtype_code, extension, ready, require_range
from pyllm.cpu_kernels._routing import sort_by_expert
from pyllm.reference._precision import accumulation_dtype

GROUP_BYTES = 8 << 20
"""Scratch of the experts that are worked on together: a share of the cache all threads read."""


def moe_ffn_forward(
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_ffn.moe_ffn_forward`."""
    code = dtype_code("moe_ffn", x_ND.dtype)
    order_R, position_NA, offsets_E1 = sort_by_expert(experts_NA, w_in_EFD.shape[0])
    x_ND, w_in_EFD, w_out_EDF = x_ND.contiguous(), w_in_EFD.contiguous(), w_out_EDF.contiguous()
    n_rows = order_R.shape[0]
    pre_RF = x_ND.new_empty(n_rows, w_in_EFD.shape[1])
    y_ND = x_ND.new_empty(x_ND.shape)
    weights_wide = ready(weights_NA, accumulation_dtype(x_ND.dtype))
    extension().moe_ffn_forward(
        code,
        activation == "swiglu",
        x_ND.data_ptr(),
        w_in_EFD.data_ptr(),
        w_out_EDF.data_ptr(),
        weights_wide.data_ptr(),
        order_R.data_ptr(),
        position_NA.data_ptr(),
        offsets_E1.data_ptr(),
        pre_RF.data_ptr(),
        y_ND.data_ptr(),
        x_ND.shape[0],
        experts_NA.shape[1],
        *w_out_EDF.shape,
        GROUP_BYTES,
        torch.get_num_threads(),
    )
    return y_ND, pre_RF, order_R, position_NA, offsets_E1


def moe_ffn_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    pre_RF: Tensor,
    order_R: Tensor,
    position_NA: Tensor,
    offsets_E1: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_ffn.moe_ffn_backward`."""
    code = dtype_code("moe_ffn", x_ND.dtype)
    dy_ND, x_ND, pre_RF = ready(dy_ND, x_ND.dtype), x_ND.contiguous(), pre_RF.contiguous()
    w_in_EFD, w_out_EDF = w_in_EFD.contiguous(), w_out_EDF.contiguous()
    order_R, position_NA = ready(order_R, torch.int32), ready(position_NA, torch.int32)
    offsets_E1 = ready(offsets_E1, torch.int32)
    weights_wide = ready(weights_NA, accumulation_dtype(x_ND.dtype))
    require_range("moe_ffn", "order", order_R, order_R.shape[0])
    require_range("moe_ffn", "position", position_NA, order_R.shape[0])
    dx_ND = x_ND.new_empty(x_ND.shape)
    dw_in, dw_out = w_in_EFD.new_empty(w_in_EFD.shape), w_out_EDF.new_empty(w_out_EDF.shape)
    dweights_NA = torch.empty_like(weights_wide)
    extension().moe_ffn_backward(
        code,
        activation == "swiglu",
        dy_ND.data_ptr(),
        x_ND.data_ptr(),
        w_in_EFD.data_ptr(),
        w_out_EDF.data_ptr(),
        weights_wide.data_ptr(),
        pre_RF.data_ptr(),
        order_R.data_ptr(),
        position_NA.data_ptr(),
        offsets_E1.data_ptr(),
        dx_ND.data_ptr(),
        dw_in.data_ptr(),
        dw_out.data_ptr(),
        dweights_NA.data_ptr(),
        x_ND.shape[0],
        weights_NA.shape[1],
        *w_out_EDF.shape,
        GROUP_BYTES,
        torch.get_num_threads(),
    )
    return dx_ND, dw_in, dw_out, dweights_NA.to(weights_NA.dtype)
