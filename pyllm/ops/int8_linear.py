"""The door of ``int8_linear``: checks, registration, choice of face. How weights become int8."""

import torch
from torch import Tensor

from pyllm.cpu_kernels.int8_linear import int8_linear_plain
from pyllm.ops._checks import (
    check_dense,
    check_flag,
    check_floating,
    check_inference,
    check_same_device,
    check_shape,
)
from pyllm.ops._registry import choose_face, nothing_between, register_inference
from pyllm.reference._precision import LARGEST_INT8_WIDTH
from pyllm.reference.int8_linear import quantize_rows


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    quantize_input: bool = True,
    face: str | None = None,
) -> Tensor:
    """``x @ (weight * weight_scale[:, None]).T``, with int8 weights; for inference only.

    With ``quantize_input`` each row of ``x`` is rounded to int8 by a scale of its own, computed in
    float32 (W8A8: LLM.int8(), arXiv:2208.07339, sec. 2.1), and the sums are exact ones of integers;
    the error is what that rounding makes, about 0.5% of the result for normal numbers. Without,
    only the weights are rounded (W8A16).

    Args:
        x: (N, D) floating point.
        weight: (F, D) int8, see :func:`quantize_int8`.
        weight_scale: (F,) floating point; the float weights are ``weight * weight_scale[:, None]``.
        quantize_input: int8 products, or float ones?
        face: one of ``available_faces``; by default the best for the device.

    Returns:
        (N, F) in the dtype of ``x``. A row of ``x`` that is not finite gives a row that is not.

    Raises:
        ValueError: wrong shape, dtype or device, a width beyond 132,104 with ``quantize_input``, an
            input that requires a gradient while gradients are on.
    """
    if face is None and quantize_input is True and _goes_straight(x, weight, weight_scale):
        y = int8_linear_plain(x, weight, weight_scale, quantize_input)
        if y is not None:
            return y
    check_floating("int8_linear", x=x, weight_scale=weight_scale)
    check_dense("int8_linear", "weight", weight)
    if weight.dtype != torch.int8:
        raise ValueError(f"int8_linear: weight must be int8, got {weight.dtype}")
    check_shape("int8_linear", "x", x, ("N", "D"))
    check_shape("int8_linear", "weight", weight, ("F", x.shape[1]))
    check_shape("int8_linear", "weight_scale", weight_scale, (weight.shape[0],))
    check_flag("int8_linear", "quantize_input", quantize_input)
    check_same_device("int8_linear", x=x, weight=weight, weight_scale=weight_scale)
    check_inference(
        "int8_linear", "no gradient flows through integers", x=x, weight_scale=weight_scale
    )
    if quantize_input and x.shape[1] > LARGEST_INT8_WIDTH:
        raise ValueError(
            f"int8_linear: x must be at most {LARGEST_INT8_WIDTH:,} wide, or its sums leave int32, "
            f"got {tuple(x.shape)}; give quantize_input=False"
        )
    chosen = choose_face("int8_linear", x.device.type, face)
    return torch.ops.pyllm.int8_linear_forward(x, weight, weight_scale, quantize_input, chosen)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float weights as int8, symmetric, with a scale for each row (output channel).

    Args:
        weight: (F, D) floating point and finite.

    Returns:
        (F, D) int8 from -127 to 127, and (F,) float32 scales.

    Raises:
        ValueError: wrong shape or dtype, or a number that is not finite.
    """
    check_floating("quantize_int8", weight=weight)
    check_shape("quantize_int8", "weight", weight, ("F", "D"))
    q, scale = quantize_rows(weight.detach())
    if not bool(scale.isfinite().all()):
        rows = (~scale.isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"quantize_int8: weight must be finite, got NaN or infinity in row {rows[0]}"
            + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
        )
    return q, scale


def _goes_straight(x: Tensor, weight: Tensor, weight_scale: Tensor) -> bool:
    return (
        nothing_between(x, weight, weight_scale)
        and choose_face("int8_linear", "cpu", None) == "cpu"
    )


def _fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, quantize_input: bool, face: str
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


register_inference(
    "int8_linear",
    forward=(
        "(Tensor x, Tensor weight, Tensor weight_scale, bool quantize_input, str face) -> Tensor"
    ),
    fake=_fake,
    faces={"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")},
)
