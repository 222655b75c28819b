"""The mixture of experts in CUDA C++: ``csrc/cuda/moe_ffn*.cu``. The same bits every time.

For cards without tensor cores. An expert out of range is no error here, which would mean to wait
for the card: what such a choice adds is NaN.
"""

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.cuda_kernels._routing import as_index, sort_by_expert, sum_rows
from pyllm.cuda_kernels._tile import tile_columns, tile_rows
from pyllm.reference._precision import accumulation_dtype

FEW_TOKENS = 4
"""Up to so many, experts' rows are multiplied by vectors; above, tiles of sorted rows are."""


def _tiles(offsets_E1: Tensor, n_rows: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(expert, first row) of each tile, and the number of them: a bound that needs no counts."""
    rows, n_experts = tile_rows(dtype), offsets_E1.numel() - 1
    n_tiles = n_rows // rows + min(n_experts + 1, n_rows)
    tiles = offsets_E1.new_empty(n_tiles, 2)
    launch("moe_tiles", offsets_E1, tiles, n_experts, n_rows, rows, n_tiles)
    return tiles, n_tiles


def moe_ffn_forward(
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_ffn.moe_ffn_forward`."""
    code, wide = dtype_code("moe_ffn", x_ND.dtype), accumulation_dtype(x_ND.dtype)
    n_experts, width, hidden = w_out_EDF.shape
    experts_NA = as_index(experts_NA, n_experts)
    x_ND, w_in_EFD, w_out_EDF = ready(x_ND), ready(w_in_EFD), ready(w_out_EDF)
    weights_wide, gated = ready(weights_NA, wide), activation == "swiglu"
    n_tokens, top_k = experts_NA.shape
    n_rows = n_tokens * top_k
    pre_RF = x_ND.new_empty(n_rows, w_in_EFD.shape[1])
    h_RF = x_ND.new_empty(n_rows, hidden)
    if 0 < n_tokens <= FEW_TOKENS and top_k:
        y_ND, order_R = torch.empty_like(x_ND), experts_NA.new_empty(n_rows)
        position_NA = torch.empty_like(experts_NA)
        offsets_E1 = experts_NA.new_empty(n_experts + 1)
        launch(
            "moe_ffn_few",
            code,
            x_ND,
            w_in_EFD,
            w_out_EDF,
            weights_wide,
            experts_NA,
            y_ND,
            pre_RF,
            h_RF,
            order_R,
            position_NA,
            offsets_E1,
            n_tokens,
            top_k,
            n_experts,
            width,
            hidden,
            gated,
        )
        return y_ND, pre_RF, order_R, position_NA, offsets_E1
    order_R, position_NA, offsets_E1 = sort_by_expert(experts_NA, n_experts)
    tiles, n_tiles = _tiles(offsets_E1, n_rows, x_ND.dtype)
    y_RD = x_ND.new_empty(n_rows, width)
    launch(
        "moe_ffn_forward",
        code,
        x_ND,
        w_in_EFD,
        w_out_EDF,
        order_R,
        offsets_E1,
        tiles,
        pre_RF,
        h_RF,
        y_RD,
        n_rows,
        top_k,
        n_experts,
        width,
        hidden,
        gated,
        n_tiles,
    )
    y_ND = sum_rows("moe_ffn", y_RD, weights_wide, position_NA)
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
    code, wide = dtype_code("moe_ffn", x_ND.dtype), accumulation_dtype(x_ND.dtype)
    n_experts, width, hidden = w_out_EDF.shape
    n_rows, top_k = order_R.numel(), weights_NA.shape[1]
    dy_ND, x_ND, pre_RF = ready(dy_ND, x_ND.dtype), ready(x_ND), ready(pre_RF)
    w_in_EFD, w_out_EDF, weights_wide = ready(w_in_EFD), ready(w_out_EDF), ready(weights_NA, wide)
    order_R, offsets_E1 = as_index(order_R, n_rows), as_index(offsets_E1, n_rows)
    position_NA = as_index(position_NA, n_rows)
    tiles, n_tiles = _tiles(offsets_E1, n_rows, x_ND.dtype)
    dpre_RF, h_RF = torch.empty_like(pre_RF), x_ND.new_empty(n_rows, hidden)
    partials = weights_wide.new_empty(-(-hidden // tile_columns(x_ND.dtype)), n_rows)
    dx_RD = x_ND.new_empty(n_rows, width)
    dw_in, dw_out = torch.empty_like(w_in_EFD), torch.empty_like(w_out_EDF)
    dweights_NA = torch.empty_like(weights_wide)
    launch(
        "moe_ffn_backward",
        code,
        dy_ND,
        x_ND,
        w_in_EFD,
        w_out_EDF,
        weights_wide,
        pre_RF,
        order_R,
        position_NA,
        offsets_E1,
        tiles,
        dpre_RF,
        h_RF,
        partials,
        dx_RD,
        dw_in,
        dw_out,
        dweights_NA,
        n_rows,
        top_k,
        n_experts,
        width,
        hidden,
        activation == "swiglu",
        n_tiles,
    )
    dx_ND = sum_rows("moe_ffn", dx_RD, None, position_NA)
    return dx_ND, dw_in, dw_out, dweights_NA.to(weights_NA.dtype)
