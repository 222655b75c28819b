"""The door of ``rms_norm``: checks, registration, choice of face."""

import torch
from torch import Tensor

from pyllm.ops._checks import (
    check_floating,
    check_real,
    check_same_device,
    check_shape,
)
from pyllm.ops._registry import choose_face, register


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, face: str | None = None) -> Tensor:
    """Scale each row of ``x`` to unit root mean square, then by ``weight``.

    ``y = x / sqrt(mean(x^2) + eps) * weight`` (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: (..., D), float64, float32, bfloat16 or float16; the arithmetic is in float32 or wider.
        weight: (D,), of any floating dtype.
        eps: added to the mean square.
        face: one of ``available_faces``; by default the best for the device.

    Returns:
        (..., D) in the dtype of ``x``.

    Raises:
        ValueError: wrong shape, dtype or device, or a face that does not exist here.
    """
    check_floating("rms_norm", x=x, weight=weight)
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar")
    if x.shape[-1] == 0:
        raise ValueError(
            f"rms_norm: x must have shape (..., D) with D of at least 1, got {tuple(x.shape)}"
        )
    eps = check_real("rms_norm", "eps", eps, least=0.0)
    check_shape("rms_norm", "weight", weight, (x.shape[-1],))
    check_same_device("rms_norm", x=x, weight=weight)
    chosen = choose_face("rms_norm", x.device.type, face)
    y, _ = torch.ops.pyllm.rms_norm_forward(x, weight, eps, chosen)
    return y


def _fake_forward(x: Tensor, weight: Tensor, eps: float, face: str) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, face: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, ctx.face = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, dy, _drstd):  # type: ignore[no-untyped-def]
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.pyllm.rms_norm_backward(dy, x, weight, rstd, ctx.face)
    return dx, dweight, None, None


register(
    "rms_norm",
    forward="(Tensor x, Tensor weight, float eps, str face) -> (Tensor, Tensor)",
    backward="(Tensor dy, Tensor x, Tensor weight, Tensor rstd, str face) -> (Tensor, Tensor)",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradient=_gradient,
    faces={"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")},
)
