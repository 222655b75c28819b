"""The output projection and its loss in C++ (``csrc/cpu/linear_cross_entropy.cpp``)."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import (
    dtype_code,
    extension,
    ready,
    require_range,
)
from pyllm.reference._precision import accumulation_dtype

CHUNK = 8192
"""Rows at a time: scratch grows with their number."""

BLOCK_BYTES = 8 << 20
"""The backward takes as many words at a time as give so much of the logits' gradient: a share of
the cache that all threads read."""


def linear_cross_entropy_forward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.linear_cross_entropy.linear_cross_entropy_forward`."""
    code = dtype_code("linear_cross_entropy", x_ND.dtype)
    x_ND, weight_VD = x_ND.contiguous(), weight_VD.contiguous()
    targets_N = ready(targets_N, torch.int64)
    n_words, width = weight_VD.shape
    require_range("linear_cross_entropy", "targets", targets_N, n_words, ignore_index)
    loss_N = torch.empty(x_ND.shape[0], dtype=accumulation_dtype(x_ND.dtype))
    lse_N = torch.empty_like(loss_N)
    for start in range(0, x_ND.shape[0], CHUNK):
        extension().linear_cross_entropy_forward(
            code,
            x_ND[start:].data_ptr(),
            weight_VD.data_ptr(),
            targets_N[start:].data_ptr(),
            ignore_index,
            loss_N[start:].data_ptr(),
            lse_N[start:].data_ptr(),
            min(CHUNK, x_ND.shape[0] - start),
            width,
            n_words,
            torch.get_num_threads(),
        )
    return loss_N, lse_N


def linear_cross_entropy_backward(
    dloss_N: Tensor,
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.linear_cross_entropy.linear_cross_entropy_backward`."""
    if x_ND.dtype == torch.float16:  # gradients under 6e-8 would be zeros
        dx_ND, dweight_VD = linear_cross_entropy_backward(
            dloss_N, x_ND.float(), weight_VD.float(), targets_N, lse_N, ignore_index
        )
        return dx_ND.half(), dweight_VD.half()
    code, wide = dtype_code("linear_cross_entropy", x_ND.dtype), accumulation_dtype(x_ND.dtype)
    x_ND, weight_VD = x_ND.contiguous(), weight_VD.contiguous()
    targets_N = ready(targets_N, torch.int64)
    dloss_N, lse_N = ready(dloss_N, wide), ready(lse_N, wide)
    n_words, width = weight_VD.shape
    require_range("linear_cross_entropy", "targets", targets_N, n_words, ignore_index)
    dx_ND = torch.empty_like(x_ND)
    sum_VD = None
    for start in range(0, max(x_ND.shape[0], 1), CHUNK):
        part_VD = weight_VD.new_empty(weight_VD.shape)
        extension().linear_cross_entropy_backward(
            code,
            x_ND[start:].data_ptr(),
            weight_VD.data_ptr(),
            targets_N[start:].data_ptr(),
            ignore_index,
            lse_N[start:].data_ptr(),
            dloss_N[start:].data_ptr(),
            dx_ND[start:].data_ptr(),
            part_VD.data_ptr(),
            min(CHUNK, x_ND.shape[0] - start),
            width,
            n_words,
            BLOCK_BYTES,
            torch.get_num_threads(),
        )
        sum_VD = part_VD if sum_VD is None else sum_VD.to(wide).add_(part_VD)
    assert sum_VD is not None
    return dx_ND, sum_VD.to(weight_VD.dtype)
