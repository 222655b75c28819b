"""The door of ``kv_append``: checks, registration, choice of face."""

import torch
from torch import Tensor

from pyllm.ops._cache import check_cache, check_positions, check_written
from pyllm.ops._checks import (
    check_floating,
    check_inference,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from pyllm.ops._registry import autocast_dtype, choose_face, register_inference


def kv_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    counts: Tensor,
    *,
    sinks: int = 0,
    rolling: bool = False,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    face: str | None = None,
) -> None:
    """Write new keys and values into a kv cache, in place; for inference only.

    A contiguous cache keeps position ``p`` in slot ``p``. A rolling one keeps the first ``sinks``
    positions there and the others in a ring, ``sinks + (p - sinks) % (S - sinks)`` (Mistral 7B,
    arXiv:2310.06825, sec. 2; sinks: StreamingLLM, arXiv:2309.17453).

    Args:
        k_cache, v_cache: (B, S, G, K) floating point or int8, contiguous; written to.
        k, v: (B, T, G, K) of the same dtype; under autocast they are converted to it. For an int8
            cache of any floating one, and rounded to integers: each position and head by a scale
            of its own, its largest magnitude / 127, computed in float32. One that is not finite
            becomes zeros with a scale that is not finite, and is read as NaN.
        starts: (B,) int32 or int64, the position of each row's first new token.
        counts: (B,) int32 or int64, how many of the T are written; the rest is padding. Of more
            than the ring holds only the last are.
        sinks: positions at the front that are never overwritten in a rolling cache.
        rolling: is the cache a ring?
        k_scales, v_scales: (B, S, G) float32, contiguous; written to. For an int8 cache only.
        face: one of ``available_faces``; by default the best for the device.

    Raises:
        ValueError: wrong shape, dtype or device, an int8 cache without scales or another one with
            them, no more slots than sinks in a rolling cache, caches or scales that are not
            contiguous or share memory with another input, an input that requires a gradient while
            gradients are on; on the CPU also a start or count out of range.
    """
    sinks = check_cache(
        "kv_append", k_cache, v_cache, starts, counts, k_scales, v_scales, sinks, rolling
    )
    check_floating("kv_append", k=k, v=v)
    batch, n_slots, n_kv_heads, head_dim = k_cache.shape
    check_shape("kv_append", "k", k, (batch, "T", n_kv_heads, head_dim))
    check_shape("kv_append", "v", v, tuple(k.shape))
    written = {"k_cache": k_cache, "v_cache": v_cache}
    if k_scales is not None and v_scales is not None:
        written |= {"k_scales": k_scales, "v_scales": v_scales}
    tensors = {**written, "k": k, "v": v}
    check_same_device("kv_append", **tensors, starts=starts, counts=counts)
    check_inference("kv_append", "no gradient flows through a kv cache", **tensors)
    if k_scales is not None:
        check_same_dtype("kv_append", k=k, v=v)
    else:
        if autocast_dtype(k.device.type) is not None:
            k, v = k.to(k_cache.dtype), v.to(v_cache.dtype)
        check_same_dtype("kv_append", k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    read = {"k": k, "v": v, "starts": starts, "counts": counts}
    check_written("kv_append", written, read)
    check_positions("kv_append", starts, counts, k.shape[1], n_slots, rolling)
    chosen = choose_face("kv_append", k.device.type, face)
    torch.ops.pyllm.kv_append_forward(
        k_cache, v_cache, k, v, starts, counts, sinks, rolling, k_scales, v_scales, chosen
    )


def _fake(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    counts: Tensor,
    sinks: int,
    rolling: bool,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    face: str,
) -> None:
    return None


register_inference(
    "kv_append",
    forward=(
        "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor starts,"
        " Tensor counts, int sinks, bool rolling, Tensor(c!)? k_scales, Tensor(d!)? v_scales,"
        " str face) -> ()"
    ),
    fake=_fake,
    faces={"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")},
)
