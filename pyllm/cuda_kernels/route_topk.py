"""Routing in CUDA C++: ``csrc/cuda/route_topk.cu``. The same bits every time."""

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.reference._precision import accumulation_dtype

MOST_WARPS = 1024
"""At most so many partial sums of the statistics: a few warps for every multiprocessor."""


def route_topk_forward(
    logits_NE: Tensor, bias_E: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.route_topk.route_topk_forward`."""
    code, wide = dtype_code("route_topk", logits_NE.dtype), accumulation_dtype(logits_NE.dtype)
    logits_NE = ready(logits_NE)
    bias_E = None if bias_E is None else ready(bias_E, wide)
    n_rows, n_experts = logits_NE.shape
    if not 1 <= top_k <= n_experts:  # the door checks as well, but not a call of the raw operation
        raise ValueError(f"route_topk: top_k must be from 1 to {n_experts}, got {top_k}")
    rows_per_warp = max(-(-n_rows // MOST_WARPS), 1)
    n_warps = -(-n_rows // rows_per_warp)
    weights_NA = logits_NE.new_empty(n_rows, top_k, dtype=wide)
    experts_NA = logits_NE.new_empty(n_rows, top_k, dtype=torch.int32)
    balance_loss, z_loss = (logits_NE.new_empty((), dtype=wide) for _ in range(2))
    tokens_per_expert_E = logits_NE.new_empty(n_experts, dtype=torch.int32)
    launch(
        "route_topk_forward",
        code,
        logits_NE,
        bias_E,
        weights_NA,
        experts_NA,
        balance_loss,
        z_loss,
        tokens_per_expert_E,
        logits_NE.new_empty(n_warps, n_experts + 1, dtype=wide),
        logits_NE.new_empty(n_warps, n_experts, dtype=torch.int32),
        n_rows,
        n_experts,
        top_k,
        rows_per_warp,
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
    logits_NE = ready(logits_NE)
    dlogits_NE = torch.empty_like(logits_NE)
    launch(
        "route_topk_backward",
        code,
        ready(dweights_NA, wide),
        ready(dbalance_loss, wide),
        ready(dz_loss, wide),
        logits_NE,
        ready(weights_NA, wide),
        ready(experts_NA, torch.int32),
        ready(tokens_per_expert_E, torch.int32),
        dlogits_NE,
        *logits_NE.shape,
        experts_NA.shape[1],
    )
    return dlogits_NE
