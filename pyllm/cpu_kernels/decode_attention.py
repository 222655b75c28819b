"""Attention of few new queries to a kv cache in C++: ``csrc/cpu/decode_attention.cpp``."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._cache import require_positions, ring_of
from pyllm.cpu_kernels._launch import dtype_code, extension, ready

PRODUCTS_OF_CHUNK = 131072
"""Products of a query's and a key's channel in what one thread takes at a time, about 10 us."""

KEY_STEP = 64
"""Chunks are of so many keys or a multiple."""


def decode_attention_forward(
    q_BTHK: Tensor,
    k_cache_BSGK: Tensor,
    v_cache_BSGK: Tensor,
    starts_B: Tensor,
    counts_B: Tensor,
    scale: float,
    window: int,
    sinks: int,
    rolling: bool,
    k_scales_BSG: Tensor | None,
    v_scales_BSG: Tensor | None,
) -> Tensor:
    """See :func:`pyllm.reference.decode_attention.decode_attention_forward`."""
    code = dtype_code("decode_attention", q_BTHK.dtype)
    batch, n_tokens, n_heads, width = q_BTHK.shape
    _, n_slots, groups, _ = k_cache_BSGK.shape
    end = require_positions("decode_attention", starts_B, counts_B, n_tokens, n_slots, rolling)
    y_BTHK = torch.empty_like(q_BTHK, memory_format=torch.contiguous_format)
    rows = n_tokens * n_heads
    if batch * rows == 0:
        return y_BTHK
    # A decoding step has microseconds: nothing is called on a tensor that is as it should be.
    if starts_B.dtype != torch.int32 or not starts_B.is_contiguous():
        starts_B = ready(starts_B, torch.int32)
    if counts_B.dtype != torch.int32 or not counts_B.is_contiguous():
        counts_B = ready(counts_B, torch.int32)
    q_BTHK = q_BTHK.contiguous()
    k_strides, v_strides = k_cache_BSGK.stride(), v_cache_BSGK.stride()
    if k_strides[3] != 1:
        k_cache_BSGK = k_cache_BSGK.contiguous()
        k_strides = k_cache_BSGK.stride()
    if v_strides[3] != 1:
        v_cache_BSGK = v_cache_BSGK.contiguous()
        v_strides = v_cache_BSGK.stride()
    if k_scales_BSG is None or v_scales_BSG is None:
        scales = (0, 0)
    else:
        k_scales_BSG, v_scales_BSG = k_scales_BSG.contiguous(), v_scales_BSG.contiguous()
        scales = (k_scales_BSG.data_ptr(), v_scales_BSG.data_ptr())
    # The same chunks whatever the number of threads, or the bits would change with it.
    seen = min(end, window + n_tokens - 1 + sinks) if window else end
    chunk = max(PRODUCTS_OF_CHUNK // (rows * width) // KEY_STEP, 1) * KEY_STEP
    extension().decode_attention(
        code,
        q_BTHK.data_ptr(),
        k_cache_BSGK.data_ptr(),
        *k_strides[:3],
        v_cache_BSGK.data_ptr(),
        *v_strides[:3],
        *scales,
        n_slots,
        starts_B.data_ptr(),
        counts_B.data_ptr(),
        scale,
        window,
        sinks,
        ring_of(n_slots, sinks, rolling),
        y_BTHK.data_ptr(),
        batch,
        n_tokens,
        groups,
        n_heads // groups,
        width,
        chunk,
        max(-(-seen // chunk), 1),
        torch.get_num_threads(),
    )
    return y_BTHK
