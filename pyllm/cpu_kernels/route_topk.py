"""Routing in C++: ``csrc/cpu/route_topk.cpp``. Bitwise the same on any number of threads."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import dtype_code, extension, ready
from pyllm.reference._precision import accumulation_dtype


def route_topk_forward(
    logits_NE: Tensor, bias_E: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.route_topk.route_topk_forward`."""
    code, wide = dtype_code("route_topk", logits_NE.dtype), accumulation_dtype(logits_NE.dtype)
    logits_NE = logits_NE.contiguous()
    bias_E = None if bias_E is None else ready(bias_E, wide)
    n_rows, n_experts = logits_NE.shape
    if not 1 <= top_k <= n_experts:  # the door checks as well, but not a call of the raw operation
        raise ValueError(f"route_topk: top_k must be from 1 to {n_experts}, got {top_k}")
    weights_NA = torch.empty(n_rows, top_k, dtype=wide)
    experts_NA = torch.empty(n_rows, top_k, dtype=torch.int32)
    balance_loss, z_loss = torch.empty((), dtype=wide), torch.empty((), dtype=wide)
    tokens_per_expert_E = torch.empty(n_experts, dtype=torch.int32)
    extension().route_topk_forward(
        code,
        logits_NE.data_ptr(),
        0 if bias_E is None else bias_E.data_ptr(),
        weights_NA.data_ptr(),
        experts_NA.data_ptr(),
        balance_loss.data_ptr(),
        z_loss.data_ptr(),
        tokens_per_expert_E.data_ptr(),
        n_rows,
        n_experts,
        top_k,
        torch.get_num_threads(),
    )
    return weights_NA, experts_NA, balance_loss, z_loss, tokens_per_expert_E


def route_topk_backward(
    dweights_NA: Tensor,
    dbalance_loss: Tensor,
    dz_loss: Tensor,
    logits_NE: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    tokens_per_expert_E: Tensor,
) -> Tensor:
    """See :func:`pyllm.reference.route_topk.route_topk_backward`."""
    code, wide = dtype_code("route_topk", logits_NE.dtype), accumulation_dtype(logits_NE.dtype)
    logits_NE = logits_NE.contiguous()
    dweights_NA, weights_NA = ready(dweights_NA, wide), ready(weights_NA, wide)
    dbalance_loss, dz_loss = ready(dbalance_loss, wide), ready(dz_loss, wide)
    experts_NA = ready(experts_NA, torch.int32)
    tokens_per_expert_E = ready(tokens_per_expert_E, torch.int32)
    dlogits_NE = torch.empty_like(logits_NE)
    extension().route_topk_backward(
        code,
        dweights_NA.data_ptr(),
        dbalance_loss.data_ptr(),
        dz_loss.data_ptr(),
        logits_NE.data_ptr(),
        weights_NA.data_ptr(),
        experts_NA.data_ptr(),
        tokens_per_expert_E.data_ptr(),
        dlogits_NE.data_ptr(),
        *logits_NE.shape,
        experts_NA.shape[1],
        torch.get_num_threads(),
    )
    return dlogits_NE
