"""The door of ``linear_cross_entropy``: checks, autocast, reduction, registration, face."""

import torch
from torch import Tensor

from pyllm._checks import check_choice
from pyllm.ops._checks import (
    LARGEST_INT,
    check_floating,
    check_index_range,
    check_integer,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_whole,
)
from pyllm.ops._registry import autocast_dtype, choose_face, register

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    face: str | None = None,
) -> Tensor:
    """Cross-entropy of ``softmax(x @ weight.T)`` in nats, never holding all logits at once.

    Args:
        x: (N, D) floating point, the last hidden states.
        weight: (V, D), the output projection.
        targets: (N,) int64 word ids, or ``ignore_index`` for rows that do not count.
        ignore_index: the target of rows without loss.
        reduction: ``mean`` over the rows that count (0 if none does), ``sum``, or ``none`` for
            the loss of each row, (N,).
        face: one of ``available_faces``; by default the best for the device.

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for ``none``.

    Raises:
        ValueError: wrong shape, dtype or device, unknown reduction; on the CPU also a target out
            of range.
    """
    check_choice("linear_cross_entropy: reduction", reduction, REDUCTIONS)
    ignore_index = check_whole("linear_cross_entropy", "ignore_index", ignore_index, -LARGEST_INT)
    check_floating("linear_cross_entropy", x=x, weight=weight)
    check_integer("linear_cross_entropy", targets=targets)
    check_shape("linear_cross_entropy", "x", x, ("N", "D"))
    check_shape("linear_cross_entropy", "weight", weight, ("V", x.shape[1]))
    check_shape("linear_cross_entropy", "targets", targets, (x.shape[0],))
    check_same_device("linear_cross_entropy", x=x, weight=weight, targets=targets)
    targets = targets.long()
    check_index_range("linear_cross_entropy", "targets", targets, weight.shape[0], ignore_index)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    check_same_dtype("linear_cross_entropy", x=x, weight=weight)
    chosen = choose_face("linear_cross_entropy", x.device.type, face)
    loss, _ = torch.ops.pyllm.linear_cross_entropy_forward(x, weight, targets, ignore_index, chosen)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (targets != ignore_index).sum().clamp_min(1)


def _fake_forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, face: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:1], dtype=wide), x.new_empty(x.shape[:1], dtype=wide)


def _fake_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    face: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, targets, ctx.ignore_index, ctx.face = inputs
    ctx.save_for_backward(x, weight, targets, output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dloss, _dlse):  # type: ignore[no-untyped-def]
    dx, dweight = torch.ops.pyllm.linear_cross_entropy_backward(
        dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.face
    )
    return dx, dweight, None, None, None


register(
    "linear_cross_entropy",
    forward=(
        "(Tensor x, Tensor weight, Tensor targets, int ignore_index, str face) -> (Tensor, Tensor)"
    ),
    backward=(
        "(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor lse, int ignore_index,"
        " str face) -> (Tensor, Tensor)"
    ),
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradient=_gradient,
    faces={"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")},
)
