"""The door of ``moe_combine``: checks, registration, choice of face."""

import torch
from torch import Tensor

from pyllm.ops._checks import (
    check_floating,
    check_index_range,
    check_integer,
    check_permutation,
    check_same_device,
    check_shape,
)
from pyllm.ops._registry import choose_face, register


def moe_combine(
    rows: Tensor, weights: Tensor, position: Tensor, *, face: str | None = None
) -> Tensor:
    """Sum each token's expert rows, weighted: the inverse of :func:`moe_dispatch`.

    Args:
        rows: (N*k, D) floating point, sorted by expert.
        weights: (N, k) floating point.
        position: (N, k) int32 or int64: the row of each choice, a permutation.
        face: one of ``available_faces``; by default the best for the device.

    Returns:
        (N, D) in the dtype of ``rows``; each sum is taken in float32 or wider.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also a position out of range.
    """
    check_floating("moe_combine", rows=rows, weights=weights)
    check_integer("moe_combine", position=position)
    check_shape("moe_combine", "weights", weights, ("N", "k"))
    check_shape("moe_combine", "position", position, tuple(weights.shape))
    check_shape("moe_combine", "rows", rows, (weights.shape[0] * weights.shape[1], "D"))
    check_same_device("moe_combine", rows=rows, weights=weights, position=position)
    check_index_range("moe_combine", "position", position, rows.shape[0])
    check_permutation("moe_combine", "position", position)
    chosen = choose_face("moe_combine", rows.device.type, face)
    return torch.ops.pyllm.moe_combine_forward(rows, weights, position, chosen)


def _fake_forward(rows: Tensor, weights: Tensor, position: Tensor, face: str) -> Tensor:
    return rows.new_empty((weights.shape[0], rows.shape[1]))


def _fake_backward(
    dy: Tensor, rows: Tensor, weights: Tensor, position: Tensor, face: str
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.face = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy):  # type: ignore[no-untyped-def]
    drows, dweights = torch.ops.pyllm.moe_combine_backward(dy, *ctx.saved_tensors, ctx.face)
    return drows, dweights, None, None


register(
    "moe_combine",
    forward="(Tensor rows, Tensor weights, Tensor position, str face) -> Tensor",
    backward=(
        "(Tensor dy, Tensor rows, Tensor weights, Tensor position, str face) -> (Tensor, Tensor)"
    ),
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradient=_gradient,
    faces={"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")},
)
