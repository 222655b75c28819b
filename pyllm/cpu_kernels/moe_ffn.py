"""The expert network in C++ (``csrc/cpu/moe_ffn.cpp``) around PyTorch's matrix products.

One expert at a time, in order: gather its rows, two products with the activation between them,
and at the end the weighted sum over each token's rows. The products take a rounded number of rows
(:func:`pyllm.cpu_kernels._shapes.rounded`). As inputs, the rows too many are zeros in a scratch
buffer; as outputs, they fall on the rows of the next expert, written after them, or behind
the last one. Scratch is allocated once per call: fresh memory costs a page fault per 4 KiB.
"""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import accumulator, dtype_code, extension, ready
from pyllm.cpu_kernels._routing import gather_rows, sort_by_expert, sum_rows
from pyllm.cpu_kernels._shapes import SLACK, rounded

PRODUCTS_BY_TORCH = True
"""Bits may change with the number of threads as those of PyTorch's products do; not in float32 and
float64 where MKL_CBWR=AUTO,STRICT is set, as pyllm's scripts do."""


def _blocks(offsets_E1: Tensor, dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """First row, number of rows and rounded number of rows of each expert."""
    bounds = offsets_E1.tolist()
    return [
        (start, stop - start, rounded(stop - start, dtype))
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def moe_ffn_forward(
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_ffn.moe_ffn_forward`."""
    code, native, threads = dtype_code("moe_ffn", x_ND.dtype), extension(), torch.get_num_threads()
    order_R, position_NA, offsets_E1 = sort_by_expert(experts_NA, w_in_EFD.shape[0])
    x_ND = x_ND.contiguous()
    width, hidden, columns = x_ND.shape[1], w_out_EDF.shape[2], w_in_EFD.shape[1]
    n_rows, top_k = order_R.shape[0], experts_NA.shape[1]
    blocks = _blocks(offsets_E1, x_ND.dtype)
    most = max((padded for _, _, padded in blocks), default=0)
    pre_RF = x_ND.new_empty(n_rows + SLACK, columns)
    y_RD = x_ND.new_empty(n_rows + SLACK, width)
    x_scratch, h_scratch = x_ND.new_empty(most, width), x_ND.new_empty(most, hidden)
    for e, (start, rows, padded) in enumerate(blocks):
        if rows == 0:
            continue
        x_rows = gather_rows(x_ND, order_R[start : start + rows], top_k, x_scratch[:padded])
        pre_rows, h_rows = pre_RF[start : start + padded], h_scratch[:padded]
        torch.mm(x_rows, w_in_EFD[e].t(), out=pre_rows)
        native.moe_activation_forward(
            code,
            activation == "swiglu",
            pre_rows.data_ptr(),
            h_rows.data_ptr(),
            rows,
            padded,
            hidden,
            threads,
        )
        torch.mm(h_rows, w_out_EDF[e].t(), out=y_RD[start : start + padded])
    weights_wide = ready(weights_NA, accumulator(x_ND.dtype))
    y_ND = sum_rows("moe_ffn", y_RD, weights_wide, position_NA)
    return y_ND, pre_RF[:n_rows], order_R, position_NA, offsets_E1


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
    code, native, threads = dtype_code("moe_ffn", x_ND.dtype), extension(), torch.get_num_threads()
    dy_ND, x_ND, pre_RF = ready(dy_ND, x_ND.dtype), x_ND.contiguous(), pre_RF.contiguous()
    order_R, position_NA = ready(order_R, torch.int32), ready(position_NA, torch.int32)
    weights_wide = ready(weights_NA, accumulator(x_ND.dtype))
    width, hidden, columns = x_ND.shape[1], w_out_EDF.shape[2], w_in_EFD.shape[1]
    n_rows, top_k = order_R.shape[0], weights_NA.shape[1]
    blocks = _blocks(offsets_E1, x_ND.dtype)
    most = max((padded for _, _, padded in blocks), default=0)
    x_scratch, dy_scratch = x_ND.new_empty(most, width), x_ND.new_empty(most, width)
    dh_scratch, wh_scratch = x_ND.new_empty(most, hidden), x_ND.new_empty(most, hidden)
    dpre_scratch = x_ND.new_empty(most, columns)
    dx_RD = x_ND.new_empty(n_rows + SLACK, width)
    dw_in, dw_out = w_in_EFD.new_empty(w_in_EFD.shape), w_out_EDF.new_empty(w_out_EDF.shape)
    dweights_NA = torch.empty_like(weights_wide)
    for e, (start, rows, padded) in enumerate(blocks):
        if rows == 0:
            dw_in[e].zero_()
            dw_out[e].zero_()
            continue
        order_rows = order_R[start : start + rows]
        x_rows = gather_rows(x_ND, order_rows, top_k, x_scratch[:padded])
        dy_rows = gather_rows(dy_ND, order_rows, top_k, dy_scratch[:padded])
        dh_rows, wh_rows = dh_scratch[:padded], wh_scratch[:padded]
        dpre_rows = dpre_scratch[:padded]
        torch.mm(dy_rows, w_out_EDF[e], out=dh_rows)  # not yet weighted
        native.moe_activation_backward(
            code,
            activation == "swiglu",
            dh_rows.data_ptr(),
            pre_RF[start].data_ptr(),
            weights_wide.data_ptr(),
            order_rows.data_ptr(),
            wh_rows.data_ptr(),
            dpre_rows.data_ptr(),
            dweights_NA.data_ptr(),
            rows,
            padded,
            hidden,
            threads,
        )
        torch.mm(dy_rows.t(), wh_rows, out=dw_out[e])
        torch.mm(dpre_rows.t(), x_rows, out=dw_in[e])
        torch.mm(dpre_rows, w_in_EFD[e], out=dx_RD[start : start + padded])
    dx_ND = sum_rows("moe_ffn", dx_RD, None, position_NA)
    return dx_ND, dw_in, dw_out, dweights_NA.to(weights_NA.dtype)
