"""The counting sort by expert and the sum over a token's rows, for the launchers that need them."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import dtype_code, extension, require_range


def sort_by_expert(experts_NA: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_dispatch.sort_by_expert`.

    Raises:
        ValueError: an expert is not in ``[0, n_experts)``.
    """
    given_NA, experts_NA = experts_NA, experts_NA.to(torch.int32).contiguous()
    order_R = torch.empty(experts_NA.numel(), dtype=torch.int32)
    position_NA = torch.empty_like(experts_NA)
    offsets_E1 = torch.empty(n_experts + 1, dtype=torch.int32)
    extension().sort_by_expert(
        experts_NA.data_ptr(),
        experts_NA.numel(),
        n_experts,
        order_R.data_ptr(),
        position_NA.data_ptr(),
        offsets_E1.data_ptr(),
    )
    # In int32, 2^32 + 1 would be expert 1.
    wrapped = experts_NA.dtype != given_NA.dtype and not torch.equal(
        experts_NA.to(given_NA), given_NA
    )
    if wrapped or int(offsets_E1[-1]) != experts_NA.numel():
        low, high = (int(bound) for bound in torch.aminmax(given_NA))
        raise ValueError(
            f"experts must be between 0 and {n_experts - 1}, got values from {low} to {high}"
        )
    return order_R, position_NA, offsets_E1


def gather_rows(source_ND: Tensor, order_R: Tensor, top_k: int, out_RD: Tensor) -> Tensor:
    """Write ``source[order // top_k]`` to ``out``."""
    extension().gather_rows(
        source_ND.data_ptr(),
        order_R.data_ptr(),
        top_k,
        out_RD.data_ptr(),
        order_R.shape[0],
        source_ND.shape[1] * source_ND.itemsize,
        torch.get_num_threads(),
    )
    return out_RD


def sum_rows(op: str, rows_RD: Tensor, weights_NA: Tensor | None, position_NA: Tensor) -> Tensor:
    """Sum each token's rows, times its weights (contiguous, accumulator dtype) if there are any."""
    n_tokens, top_k = position_NA.shape
    require_range(op, "position", position_NA, rows_RD.shape[0])
    y_ND = rows_RD.new_empty(n_tokens, rows_RD.shape[1])
    extension().moe_combine_forward(
        dtype_code(op, rows_RD.dtype),
        rows_RD.data_ptr(),
        0 if weights_NA is None else weights_NA.data_ptr(),
        position_NA.data_ptr(),
        y_ND.data_ptr(),
        n_tokens,
        top_k,
        rows_RD.shape[1],
        torch.get_num_threads(),
    )
    return y_ND
