"""The loss in C++ (``csrc/cpu/linear_cross_entropy.cpp``) around PyTorch's matrix products.

Rows are taken in chunks whose logits fit in ``CHUNK_BYTES``; one scratch buffer holds each in turn,
and the backward turns it into its gradient in place.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import (
    accumulator,
    dtype_code,
    extension,
    ready,
    require_range,
)
from pyllm.cpu_kernels._shapes import rounded

PRODUCTS_BY_TORCH = True
"""Bits may change with the number of threads as those of PyTorch's products do; not in float32 and
float64 where MKL_CBWR=AUTO,STRICT is set, as pyllm's scripts do."""

CHUNK_BYTES = 8 << 20
MIN_CHUNK = 256
"""Fewer rows would make the products of a large vocabulary slow."""


def _chunks(n_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each chunk."""
    fits = CHUNK_BYTES // max(row_bytes, 1) // MIN_CHUNK * MIN_CHUNK
    size = max(fits, MIN_CHUNK)
    for start in range(0, n_rows, size):
        yield start, min(size, n_rows - start)


def _padded_chunk(x_ND: Tensor, start: int, rows: int) -> Tensor:
    """Rows of ``x`` from ``start``, with zero rows up to a rounded number."""
    padded = rounded(rows, x_ND.dtype)
    if padded == rows:
        return x_ND[start : start + rows]
    x_CD = x_ND.new_zeros(padded, x_ND.shape[1])
    x_CD[:rows] = x_ND[start : start + rows]
    return x_CD


def _scratch(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """Room for the logits of the largest chunk."""
    n_words = weight_VD.shape[0]
    most = max((rows for _, rows in _chunks(x_ND.shape[0], n_words * x_ND.itemsize)), default=0)
    return x_ND.new_empty(rounded(most, x_ND.dtype), n_words)


def linear_cross_entropy_forward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.linear_cross_entropy.linear_cross_entropy_forward`."""
    if x_ND.dtype == torch.float16:  # logits over 65,504 would overflow
        return linear_cross_entropy_forward(
            x_ND.float(), weight_VD.float(), targets_N, ignore_index
        )
    code, native = dtype_code("linear_cross_entropy", x_ND.dtype), extension()
    x_ND, targets_N = x_ND.contiguous(), ready(targets_N, torch.int64)
    n_words = weight_VD.shape[0]
    require_range("linear_cross_entropy", "targets", targets_N, n_words, ignore_index)
    loss_N = torch.empty(x_ND.shape[0], dtype=accumulator(x_ND.dtype))
    lse_N = torch.empty_like(loss_N)
    scratch = _scratch(x_ND, weight_VD)
    for start, rows in _chunks(x_ND.shape[0], n_words * x_ND.itemsize):
        x_CD = _padded_chunk(x_ND, start, rows)
        z_CV = scratch[: x_CD.shape[0]]
        torch.mm(x_CD, weight_VD.t(), out=z_CV)
        native.cross_entropy_forward(
            code,
            z_CV.data_ptr(),
            targets_N[start:].data_ptr(),
            ignore_index,
            loss_N[start:].data_ptr(),
            lse_N[start:].data_ptr(),
            rows,
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
    if x_ND.dtype == torch.float16:
        dx_ND, dweight_VD = linear_cross_entropy_backward(
            dloss_N, x_ND.float(), weight_VD.float(), targets_N, lse_N, ignore_index
        )
        return dx_ND.half(), dweight_VD.half()
    code, wide = dtype_code("linear_cross_entropy", x_ND.dtype), accumulator(x_ND.dtype)
    native, threads = extension(), torch.get_num_threads()
    x_ND, targets_N = x_ND.contiguous(), ready(targets_N, torch.int64)
    dloss_N, lse_N = ready(dloss_N, wide), ready(lse_N, wide)
    n_words = weight_VD.shape[0]
    require_range("linear_cross_entropy", "targets", targets_N, n_words, ignore_index)
    dx_ND = torch.empty_like(x_ND)
    sum_VD = torch.zeros(weight_VD.shape, dtype=wide)
    part_VD = x_ND.new_empty(weight_VD.shape)
    scratch = _scratch(x_ND, weight_VD)
    for start, rows in _chunks(x_ND.shape[0], n_words * x_ND.itemsize):
        x_CD = _padded_chunk(x_ND, start, rows)
        z_CV = scratch[: x_CD.shape[0]]
        torch.mm(x_CD, weight_VD.t(), out=z_CV)
        native.cross_entropy_backward(
            code,
            z_CV.data_ptr(),
            targets_N[start:].data_ptr(),
            ignore_index,
            lse_N[start:].data_ptr(),
            dloss_N[start:].data_ptr(),
            rows,
            n_words,
            threads,
        )
        z_CV[rows:].zero_()
        if x_CD.shape[0] == rows:
            torch.mm(z_CV, weight_VD, out=dx_ND[start : start + rows])
        else:
            dx_ND[start:] = torch.mm(z_CV, weight_VD)[:rows]
        torch.mm(z_CV.t(), x_CD, out=part_VD)
        native.accumulate(
            code, start == 0, part_VD.data_ptr(), sum_VD.data_ptr(), sum_VD.numel(), threads
        )
    return dx_ND, sum_VD.to(weight_VD.dtype)
