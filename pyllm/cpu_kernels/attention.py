"""Attention in C++: ``csrc/cpu/attention.cpp``."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import dtype_code, extension, ready, unit_stride
from pyllm.reference._precision import accumulation_dtype


def _problem(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, sinks: int
) -> tuple[object, ...]:
    """The kernels' first arguments; the caller keeps the tensors, whose channels are adjacent."""
    batch, n_tokens, n_heads, width = q.shape
    n_keys, groups = k.shape[1:3]
    return (
        dtype_code("attention", q.dtype),
        q.data_ptr(),
        *q.stride()[:3],
        k.data_ptr(),
        *k.stride()[:3],
        v.data_ptr(),
        *v.stride()[:3],
        scale,
        causal,
        window,
        min(sinks, n_keys),
        batch,
        n_tokens,
        n_keys,
        groups,
        n_heads // groups,
        width,
    )


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
    batch, n_tokens, n_heads, _ = q_BTHK.shape
    lse_BHT = torch.empty(batch, n_heads, n_tokens, dtype=accumulation_dtype(q_BTHK.dtype))
    y_BTHK = torch.empty_like(q_BTHK, memory_format=torch.contiguous_format)
    if y_BTHK.numel() == 0:
        return y_BTHK, lse_BHT.fill_(float("-inf"))
    q_BTHK, k_BSGK, v_BSGK = (unit_stride(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    extension().attention_forward(
        *_problem(q_BTHK, k_BSGK, v_BSGK, scale, causal, window, sinks),
        y_BTHK.data_ptr(),
        lse_BHT.data_ptr(),
        torch.get_num_threads(),
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
    dq_BTHK, dk_BSGK, dv_BSGK = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHK, k_BSGK, v_BSGK)
    )
    if q_BTHK.numel() == 0 or k_BSGK.numel() == 0:
        return dq_BTHK.zero_(), dk_BSGK.zero_(), dv_BSGK.zero_()
    q_BTHK, k_BSGK, v_BSGK = (unit_stride(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    dy_BTHK, y_BTHK = ready(dy_BTHK, q_BTHK.dtype), y_BTHK.contiguous()
    lse_BHT = ready(lse_BHT, accumulation_dtype(q_BTHK.dtype))
    extension().attention_backward(
        *_problem(q_BTHK, k_BSGK, v_BSGK, scale, causal, window, sinks),
        dy_BTHK.data_ptr(),
        y_BTHK.data_ptr(),
        lse_BHT.data_ptr(),
        dq_BTHK.data_ptr(),
        dk_BSGK.data_ptr(),
        dv_BSGK.data_ptr(),
        torch.get_num_threads(),
    )
    return dq_BTHK, dk_BSGK, dv_BSGK
