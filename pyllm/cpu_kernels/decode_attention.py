"""Attention of few new queries to a kv cache in C++: ``csrc/cpu/decode_attention.cpp``."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._cache import require_positions, ring_of
from pyllm.cpu_kernels._launch import accumulator, dtype_code, extension, ready, unit_stride

PRODUCTS_OF_CHUNK = 65536
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
) -> Tensor:
    """See :func:`pyllm.reference.decode_attention.decode_attention_forward`."""
    code, wide = dtype_code("decode_attention", q_BTHK.dtype), accumulator(q_BTHK.dtype)
    batch, n_tokens, n_heads, width = q_BTHK.shape
    n_slots, groups = k_cache_BSGK.shape[1:3]
    end = require_positions("decode_attention", starts_B, counts_B, n_tokens, n_slots, rolling)
    y_BTHK = q_BTHK.new_empty(q_BTHK.shape)
    if y_BTHK.numel() == 0:
        return y_BTHK
    starts_B, counts_B = ready(starts_B, torch.int32), ready(counts_B, torch.int32)
    q_BTHK = ready(q_BTHK, wide)
    k_cache_BSGK, v_cache_BSGK = unit_stride(k_cache_BSGK), unit_stride(v_cache_BSGK)
    # The same chunks whatever the number of threads, or the bits would change with it.
    seen = min(end, window + n_tokens - 1 + sinks) if window else end
    rows = n_tokens * n_heads
    chunk = max(PRODUCTS_OF_CHUNK // (rows * width) // KEY_STEP, 1) * KEY_STEP
    n_chunks = max(-(-seen // chunk), 1)
    workspace = torch.empty(batch * n_chunks * rows * (width + 2), dtype=wide)
    extension().decode_attention(
        code,
        q_BTHK.data_ptr(),
        k_cache_BSGK.data_ptr(),
        *k_cache_BSGK.stride()[:3],
        v_cache_BSGK.data_ptr(),
        *v_cache_BSGK.stride()[:3],
        starts_B.data_ptr(),
        counts_B.data_ptr(),
        scale,
        window,
        sinks,
        ring_of(n_slots, sinks, rolling),
        workspace.data_ptr(),
        y_BTHK.data_ptr(),
        batch,
        n_tokens,
        groups,
        n_heads // groups,
        width,
        chunk,
        n_chunks,
        torch.get_num_threads(),
    )
    return y_BTHK
