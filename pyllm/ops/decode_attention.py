"""The door of ``decode_attention``: checks, autocast, registration, choice of face."""

import math

import torch
from torch import Tensor

from pyllm.ops._cache import check_cache, check_positions
from pyllm.ops._checks import (
    check_floating,
    check_inference,
    check_real,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_whole,
)
from pyllm.ops._registry import autocast_dtype, choose_face, register_inference


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    window: int | None = None,
    sinks: int = 0,
    rolling: bool = False,
    scale: float | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    face: str | None = None,
) -> Tensor:
    """Attention of few new queries to a kv cache that holds their own keys already.

    Query ``t`` of row ``b`` stands at position ``starts[b] + t`` and sees the positions up to its
    own; with a window only the last ``window`` of them and the first ``sinks``. The cache is as
    :func:`pyllm.ops.kv_append` leaves it. For inference only.

    Args:
        q: (B, T, H, K) floating point; under autocast it is converted to the cache's dtype.
        k_cache, v_cache: (B, S, G, K) of the same dtype, G a divisor of H; or int8 with scales,
            and then q of any floating dtype.
        starts: (B,) int32 or int64, the position of each row's first query.
        counts: (B,) int32 or int64, how many of the T queries are real; the rest give zeros.
        window: a query sees the last ``window`` positions only, its own included; None for all.
        sinks: positions at the front that every query sees although the window would hide them.
        rolling: is the cache a ring? Then it has at least ``window + T - 1`` slots beside the
            sinks, so that no key of the first query's window was overwritten by the last key.
        scale: by default ``1 / sqrt(K)``.
        k_scales, v_scales: (B, S, G) float32, of an int8 cache only: a key is
            ``k_scales[..., None] * k_cache``. One whose scale is not finite is NaN.
        face: one of ``available_faces``; by default the best for the device.

    Returns:
        (B, T, H, K) in the dtype of ``q``; under autocast in the autocast dtype.

    Raises:
        ValueError: wrong shape, dtype or device, an int8 cache without scales or another one with
            them, G no divisor of H, window below 1, a rolling cache without a window or with too
            few slots, an input that requires a gradient while gradients are on; on the CPU also a
            start or count out of range.
    """
    sinks = check_cache(
        "decode_attention", k_cache, v_cache, starts, counts, k_scales, v_scales, sinks, rolling
    )
    check_floating("decode_attention", q=q)
    batch, n_slots, n_kv_heads, head_dim = k_cache.shape
    check_shape("decode_attention", "q", q, (batch, "T", "H", head_dim))
    n_queries, n_heads = q.shape[1], q.shape[2]
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if k_scales is not None and v_scales is not None:
        tensors |= {"k_scales": k_scales, "v_scales": v_scales}
    check_same_device("decode_attention", **tensors, starts=starts, counts=counts)
    check_inference("decode_attention", "no gradient flows through a kv cache", **tensors)
    if n_heads % n_kv_heads:
        raise ValueError(
            f"decode_attention: the {n_heads} query heads must be a multiple of the kv heads, "
            f"got {n_kv_heads}"
        )
    if window is not None:
        window = check_whole("decode_attention", "window (or None)", window, least=1)
    if rolling:
        _check_ring(n_slots - sinks, window, n_queries)
    dtype = autocast_dtype(q.device.type)
    if k_scales is None:
        if dtype is not None:
            q = q.to(k_cache.dtype)
        check_same_dtype("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    scale = (
        1 / math.sqrt(head_dim) if scale is None else check_real("decode_attention", "scale", scale)
    )
    check_positions("decode_attention", starts, counts, n_queries, n_slots, rolling)
    chosen = choose_face("decode_attention", q.device.type, face)
    y = torch.ops.pyllm.decode_attention_forward(
        q,
        k_cache,
        v_cache,
        starts,
        counts,
        scale,
        window or 0,
        sinks,
        rolling,
        k_scales,
        v_scales,
        chosen,
    )
    return y if dtype is None else y.to(dtype)


def _check_ring(ring: int, window: int | None, n_queries: int) -> None:
    """A ring forgets: what the first query sees must still be there after the last key."""
    if window is None:
        raise ValueError("decode_attention: a rolling cache needs a window, got None")
    needed = window + max(n_queries, 1) - 1
    if ring < needed:
        raise ValueError(
            f"decode_attention: {n_queries} queries with a window of {window} need a rolling cache "
            f"of at least {needed} slots beside the sinks, got {ring}"
        )


def _fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    counts: Tensor,
    scale: float,
    window: int,
    sinks: int,
    rolling: bool,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    face: str,
) -> Tensor:
    return q.new_empty(q.shape)


register_inference(
    "decode_attention",
    forward=(
        "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor counts, float scale,"
        " int window, int sinks, bool rolling, Tensor? k_scales, Tensor? v_scales, str face)"
        " -> Tensor"
    ),
    fake=_fake,
    faces={"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")},
)
