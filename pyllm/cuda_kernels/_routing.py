"""The counting sort by expert and the sum over a token's rows, for the launchers that need them."""

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready

LEAST_TILE = 256
"""Choices that a warp sorts, at the least: eight rounds of its lanes."""
MOST_TILES = 512
LARGEST_INDEX = 2**31 - 1
"""Of int32. No position is behind it: the kernels refuse a row of the batch that goes there."""


def as_index(tensor: Tensor, limit: int) -> Tensor:
    """Indices as the kernels want them; what int32 would wrap to another one stays out of range."""
    if tensor.dtype == torch.int64:
        tensor = tensor.clamp(-1, limit)
    return ready(tensor, torch.int32)


def sort_by_expert(experts_NA: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_dispatch.sort_by_expert`.

    Choices out of range come last, behind the last of the offsets.
    """
    experts_NA = as_index(experts_NA, n_experts)
    n_choices = experts_NA.numel()
    tile = max(LEAST_TILE, -(-n_choices // MOST_TILES))
    n_tiles = max(-(-n_choices // tile), 1)
    counts = experts_NA.new_zeros((n_experts + 1) * n_tiles)
    order_R = experts_NA.new_empty(n_choices)
    position_NA = torch.empty_like(experts_NA)
    offsets_E1 = experts_NA.new_empty(n_experts + 1)
    launch(
        "sort_by_expert",
        experts_NA,
        counts,
        order_R,
        position_NA,
        offsets_E1,
        n_choices,
        n_experts,
        tile,
    )
    return order_R, position_NA, offsets_E1


def sum_rows(op: str, rows_RD: Tensor, weights_NA: Tensor | None, position_NA: Tensor) -> Tensor:
    """Sum each token's rows, times its weights (ready, accumulator dtype) if there are any."""
    n_tokens, top_k = position_NA.shape
    rows_RD, position_NA = ready(rows_RD), as_index(position_NA, rows_RD.shape[0])
    y_ND = rows_RD.new_empty(n_tokens, rows_RD.shape[1])
    code = dtype_code(op, rows_RD.dtype)
    launch(
        "moe_combine_forward",
        code,
        rows_RD,
        weights_NA,
        position_NA,
        y_ND,
        n_tokens,
        top_k,
        rows_RD.shape[1],
    )
    return y_ND
