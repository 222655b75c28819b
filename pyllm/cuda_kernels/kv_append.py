"""New keys and values into a cache in CUDA C++: ``csrc/cuda/kv_append.cu``.

A position out of range is no error here, which would mean to wait for the card: nothing is written
outside of the cache.
"""

from torch import Tensor

from pyllm.cuda_kernels._launch import dtype_code, launch
from pyllm.cuda_kernels._routing import LARGEST_INDEX, as_index


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
    code = dtype_code("kv_append", k_BTGK.dtype)
    batch, n_tokens, groups, width = k_BTGK.shape
    n_slots = k_cache_BSGK.shape[1]
    k_BTGK = k_BTGK if k_BTGK.stride(-1) == 1 else k_BTGK.contiguous()
    v_BTGK = v_BTGK if v_BTGK.stride(-1) == 1 else v_BTGK.contiguous()
    written = [k_cache_BSGK, v_cache_BSGK]
    if k_scales_BSG is not None and v_scales_BSG is not None:
        written += [k_scales_BSG, v_scales_BSG]
    launch(
        "kv_append" if len(written) == 2 else "kv_append_int8",
        code,
        *written,
        k_BTGK,
        *k_BTGK.stride()[:3],
        v_BTGK,
        *v_BTGK.stride()[:3],
        as_index(starts_B, LARGEST_INDEX),
        as_index(counts_B, LARGEST_INDEX),
        sinks,
        n_slots - sinks if rolling else 0,
        batch,
        n_tokens,
        n_slots,
        groups,
        width,
    )
