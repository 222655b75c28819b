"""New keys and values into a cache in C++: ``csrc/cpu/kv_append.cpp``."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._cache import require_positions, ring_of
from pyllm.cpu_kernels._launch import dtype_code, extension, ready, unit_stride


def kv_append_forward(
    k_cache_BSGK: Tensor,
    v_cache_BSGK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    starts_B: Tensor,
    counts_B: Tensor,
    sinks: int,
    rolling: bool,
    k_scales_BSG: Tensor | None,
    v_scales_BSG: Tensor | None,
) -> None:
    """See :func:`pyllm.reference.kv_append.kv_append_forward`; what is written is contiguous."""
    batch, n_tokens, groups, width = k_BTGK.shape
    n_slots = k_cache_BSGK.shape[1]
    require_positions("kv_append", starts_B, counts_B, n_tokens, n_slots, rolling)
    starts_B, counts_B = ready(starts_B, torch.int32), ready(counts_B, torch.int32)
    k_BTGK, v_BTGK = unit_stride(k_BTGK), unit_stride(v_BTGK)
    written = [k_cache_BSGK.data_ptr(), v_cache_BSGK.data_ptr()]
    if k_scales_BSG is None or v_scales_BSG is None:
        write, code = extension().kv_append, k_BTGK.itemsize
    else:
        write, code = extension().kv_append_int8, dtype_code("kv_append", k_BTGK.dtype)
        written += [k_scales_BSG.data_ptr(), v_scales_BSG.data_ptr()]
    write(
        code,
        *written,
        k_BTGK.data_ptr(),
        *k_BTGK.stride()[:3],
        v_BTGK.data_ptr(),
        *v_BTGK.stride()[:3],
        starts_B.data_ptr(),
        counts_B.data_ptr(),
        sinks,
        ring_of(n_slots, sinks, rolling),
        batch,
        n_tokens,
        n_slots,
        groups,
        width,
        torch.get_num_threads(),
    )
