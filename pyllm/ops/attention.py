"""The door of ``attention``: checks, autocast, registration, choice of face."""

import math

import torch
from torch import Tensor

from pyllm.ops._checks import (
    check_flag,
    check_floating,
    check_real,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_whole,
)
from pyllm.ops._registry import autocast_dtype, choose_face, register


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    face: str | None = None,
) -> Tensor:
    """Softmax attention with grouped queries; the T queries are the last T of S positions.

    ``softmax(scale * q k^T + mask) v`` (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). Query head
    ``h`` uses kv head ``h // (H / G)`` (arXiv:2305.13245).

    Args:
        q: (B, T, H, K) floating point.
        k, v: (B, S, G, K), G a divisor of H.
        causal: a query sees no later position.
        window: a query sees the last ``window`` positions only, its own included; None for all.
        sinks: the first ``sinks`` positions are seen although the window leaves them out
            (attention sinks, arXiv:2309.17453); of no meaning without a window.
        scale: by default ``1 / sqrt(K)``.
        face: one of ``available_faces``; by default the best for the device.

    Returns:
        (B, T, H, K) in the dtype of ``q``; under autocast in the autocast dtype. A query that sees
        nothing gives zeros.

    Raises:
        ValueError: wrong shape, dtype or device, G no divisor of H, window below 1, sinks below 0,
            or a causal call with more queries than keys.
    """
    check_floating("attention", q=q, k=k, v=v)
    check_shape("attention", "q", q, ("B", "T", "H", "K"))
    batch, n_queries, n_heads, head_dim = q.shape
    check_shape("attention", "k", k, (batch, "S", "G", head_dim))
    check_shape("attention", "v", v, tuple(k.shape))
    check_same_device("attention", q=q, k=k, v=v)
    n_keys, n_kv_heads = k.shape[1], k.shape[2]
    check_flag("attention", "causal", causal)
    if n_heads % n_kv_heads:
        raise ValueError(
            f"attention: the {n_heads} query heads must be a multiple of the kv heads, "
            f"got {n_kv_heads}"
        )
    if window is not None:
        window = check_whole("attention", "window (or None)", window, least=1)
    sinks = check_whole("attention", "sinks", sinks, least=0)
    if causal and n_queries > n_keys:
        raise ValueError(
            f"attention: a causal call needs at least as many keys as queries, "
            f"got {n_queries} queries and {n_keys} keys"
        )
    dtype = autocast_dtype(q.device.type)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_same_dtype("attention", q=q, k=k, v=v)
    scale = 1 / math.sqrt(head_dim) if scale is None else check_real("attention", "scale", scale)
    chosen = choose_face("attention", q.device.type, face)
    return torch.ops.pyllm.attention_forward(q, k, v, scale, causal, window or 0, sinks, chosen)[0]


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, sinks: int, face: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    return q.new_empty(q.shape), lse


def _fake_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
    face: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.scale, ctx.causal, ctx.window, ctx.sinks, ctx.face = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dy, _dlse):  # type: ignore[no-untyped-def]
    gradients = torch.ops.pyllm.attention_backward(
        dy, *ctx.saved_tensors, ctx.scale, ctx.causal, ctx.window, ctx.sinks, ctx.face
    )
    return *gradients, None, None, None, None, None


register(
    "attention",
    forward=(
        "(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window, int sinks,"
        " str face) -> (Tensor, Tensor)"
    ),
    backward=(
        "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, float scale, bool causal,"
        " int window, int sinks, str face) -> (Tensor, Tensor, Tensor)"
    ),
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradient=_gradient,
    faces={"cpu": ("cpu", "torch", "reference"), "cuda": ("triton", "cuda", "reference")},
)
