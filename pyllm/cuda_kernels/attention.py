"""Attention in CUDA C++: ``csrc/cuda/attention*.cu``. The same bits every time.

For cards without tensor cores. Tiles of keys that no query of a tile sees are skipped.
"""

from typing import Any

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.reference._precision import accumulation_dtype

WIDEST_HEAD = 128


def unserved(stage: str, *arguments: Any) -> str | None:
    """Why a call is not served: a head's sums are kept in registers."""
    width = arguments[0].shape[-1]
    return None if width <= WIDEST_HEAD else f"heads of {width} numbers, more than {WIDEST_HEAD}"


def _sizes(q_BTHK: Tensor, k_BSGK: Tensor) -> tuple[int, ...]:
    batch, n_queries, n_heads, width = q_BTHK.shape
    return batch, n_queries, k_BSGK.shape[1], n_heads, k_BSGK.shape[2], width


def attention_forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.attention.attention_forward`."""
    code, wide = dtype_code("attention", q_BTHK.dtype), accumulation_dtype(q_BTHK.dtype)
    q_BTHK, k_BSGK, v_BSGK = ready(q_BTHK), ready(k_BSGK), ready(v_BSGK)
    batch, n_queries, n_heads, _ = q_BTHK.shape
    y_BTHK = torch.empty_like(q_BTHK)
    lse_BHT = q_BTHK.new_empty(batch, n_heads, n_queries, dtype=wide)
    launch(
        "attention_forward",
        code,
        q_BTHK,
        k_BSGK,
        v_BSGK,
        scale,
        y_BTHK,
        lse_BHT,
        *_sizes(q_BTHK, k_BSGK),
        causal,
        window,
        sinks,
    )
    return y_BTHK, lse_BHT


def attention_backward(
    dy_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    y_BTHK: Tensor,
    lse_BHT: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.attention.attention_backward`."""
    code, wide = dtype_code("attention", q_BTHK.dtype), accumulation_dtype(q_BTHK.dtype)
    dy_BTHK, y_BTHK = ready(dy_BTHK, q_BTHK.dtype), ready(y_BTHK, q_BTHK.dtype)
    q_BTHK, k_BSGK, v_BSGK = ready(q_BTHK), ready(k_BSGK), ready(v_BSGK)
    lse_BHT = ready(lse_BHT, wide)
    delta_BHT = torch.empty_like(lse_BHT)
    dq, dk, dv = torch.empty_like(q_BTHK), torch.empty_like(k_BSGK), torch.empty_like(v_BSGK)
    launch(
        "attention_backward",
        code,
        dy_BTHK,
        q_BTHK,
        k_BSGK,
        v_BSGK,
        y_BTHK,
        lse_BHT,
        scale,
        delta_BHT,
        dq,
        dk,
        dv,
        *_sizes(q_BTHK, k_BSGK),
        causal,
        window,
        sinks,
    )
    return dq, dk, dv
