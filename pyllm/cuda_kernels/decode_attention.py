"""Attention of few new queries to a kv cache in CUDA C++: ``csrc/cuda/decode_attention.cu``.

Nothing is read from the positions here, which would mean to wait for the card: a row of the batch
whose start or count is out of range is NaN.
"""

from typing import Any

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch, ready
from pyllm.reference._precision import accumulation_dtype

WIDEST_HEAD = 512
LEAST_CHUNK = 64
"""Keys of a block; a multiple of it for more than ``MOST_CHUNKS`` of them."""
MOST_CHUNKS = 64


def unserved(stage: str, *arguments: Any) -> str | None:
    """Why the kernel does not serve these arguments, or None."""
    width = arguments[0].shape[-1]
    return None if width <= WIDEST_HEAD else f"a head of {width} is wider than {WIDEST_HEAD}"


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
    code, wide = dtype_code("decode_attention", q_BTHK.dtype), accumulation_dtype(q_BTHK.dtype)
    batch, n_tokens, n_heads, width = q_BTHK.shape
    _, n_slots, groups, _ = k_cache_BSGK.shape
    q_BTHK = ready(q_BTHK)
    y_BTHK = torch.empty_like(q_BTHK)
    if k_cache_BSGK.stride(-1) != 1:
        k_cache_BSGK = k_cache_BSGK.contiguous()
    if v_cache_BSGK.stride(-1) != 1:
        v_cache_BSGK = v_cache_BSGK.contiguous()
    if k_scales_BSG is not None and v_scales_BSG is not None:
        k_scales_BSG, v_scales_BSG = k_scales_BSG.contiguous(), v_scales_BSG.contiguous()
    seen = min(n_slots, window + n_tokens - 1 + sinks) if window else n_slots
    chunk = max(-(-seen // (LEAST_CHUNK * MOST_CHUNKS)), 1) * LEAST_CHUNK
    n_chunks = max(-(-seen // chunk), 1)
    partial = (batch * groups, n_chunks, n_tokens * (n_heads // groups))
    launch(
        "decode_attention",
        code,
        q_BTHK,
        k_cache_BSGK,
        *k_cache_BSGK.stride()[:3],
        v_cache_BSGK,
        *v_cache_BSGK.stride()[:3],
        k_scales_BSG,
        v_scales_BSG,
        ready(starts_B, torch.int32),
        ready(counts_B, torch.int32),
        scale,
        window,
        sinks,
        n_slots - sinks if rolling else 0,
        y_BTHK,
        q_BTHK.new_empty(*partial, width, dtype=wide),
        q_BTHK.new_empty(partial, dtype=wide),
        q_BTHK.new_empty(partial, dtype=wide),
        batch,
        n_tokens,
        n_slots,
        groups,
        n_heads // groups,
        width,
        chunk,
        n_chunks,
    )
    return y_BTHK
