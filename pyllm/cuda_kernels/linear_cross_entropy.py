"""Linear cross-entropy in CUDA C++: ``csrc/cuda/linear_cross_entropy.cu``.

For cards without tensor cores. The logits are not stored; their gradients are, for as many words at
a time as 64 MiB hold with all rows. The two products with them are plain, and cuBLAS does
them through torch: the rows of ``dweight`` for these words are complete at once, and what is added
up over the chunks is the small ``dx``.
"""

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.cuda_kernels._tile import tile_columns
from pyllm.reference._loss_sizes import chunk_words
from pyllm.reference._precision import accumulation_dtype


def linear_cross_entropy_forward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.linear_cross_entropy.linear_cross_entropy_forward`."""
    code, wide = dtype_code("linear_cross_entropy", x_ND.dtype), accumulation_dtype(x_ND.dtype)
    x_ND, weight_VD, targets_N = ready(x_ND), ready(weight_VD), ready(targets_N, torch.int64)
    n_rows, n_words = x_ND.shape[0], weight_VD.shape[0]
    loss_N = x_ND.new_empty(n_rows, dtype=wide)
    lse_N, picked_N = torch.empty_like(loss_N), torch.empty_like(loss_N)
    partials = loss_N.new_empty(-(-n_words // tile_columns(x_ND.dtype)), 2, n_rows)
    launch(
        "linear_cross_entropy_forward",
        code,
        x_ND,
        weight_VD,
        targets_N,
        loss_N,
        lse_N,
        partials,
        picked_N,
        ignore_index,
        n_rows,
        n_words,
        x_ND.shape[1],
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
    code, wide = dtype_code("linear_cross_entropy", x_ND.dtype), accumulation_dtype(x_ND.dtype)
    x_ND, weight_VD, targets_N = ready(x_ND), ready(weight_VD), ready(targets_N, torch.int64)
    dloss_N, lse_N = ready(dloss_N, wide), ready(lse_N, wide)
    (n_rows, width), n_words = x_ND.shape, weight_VD.shape[0]
    chunk = chunk_words(n_rows, n_words, x_ND.element_size())
    dlogits = x_ND.new_empty(n_rows * chunk)
    dx_ND = x_ND.new_zeros(n_rows, width, dtype=wide)
    dweight_VD = torch.empty_like(weight_VD)
    for first in range(0, n_words, chunk):
        last = min(first + chunk, n_words)
        dlogits_NC = dlogits[: n_rows * (last - first)].view(n_rows, last - first)
        launch(
            "linear_cross_entropy_backward",
            code,
            dloss_N,
            x_ND,
            weight_VD,
            targets_N,
            lse_N,
            dlogits_NC,
            ignore_index,
            n_rows,
            width,
            first,
            last,
        )
        dx_ND += dlogits_NC @ weight_VD[first:last]
        torch.mm(dlogits_NC.t(), x_ND, out=dweight_VD[first:last])
    return dx_ND.to(x_ND.dtype), dweight_VD
