"""The door of ``rope``: checks, registration, choice of face."""

import torch
from torch import Tensor

from pyllm.ops._checks import check_floating, check_same_device, check_shape
from pyllm.ops._registry import choose_face, register


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, face: str | None = None) -> Tensor:
    """Turn each head by its position's angles (RoFormer, arXiv:2104.09864), in Llama's layout.

    Channel ``i`` of the first half of a head is paired with channel ``i`` of the second.

    Args:
        x: (B, T, H, K) floating point, K even.
        cos, sin: (T, K/2), or (B, T, K/2) where the rows of a batch stand at different positions.
            They are tables: no gradient flows into them.
        face: one of ``available_faces``; by default the best for the device.

    Raises:
        ValueError: wrong shape, dtype or device, or an odd head size.
    """
    check_floating("rope", x=x, cos=cos, sin=sin)
    check_shape("rope", "x", x, ("B", "T", "H", "K"))
    batch, n_tokens, _, head_dim = x.shape
    if head_dim % 2:
        raise ValueError(f"rope: the head size must be even, got {head_dim}")
    expected = (batch,) * (cos.dim() == 3) + (n_tokens, head_dim // 2)
    check_shape("rope", "cos", cos, expected)
    check_shape("rope", "sin", sin, expected)
    check_same_device("rope", x=x, cos=cos, sin=sin)
    chosen = choose_face("rope", x.device.type, face)
    return torch.ops.pyllm.rope_forward(x, cos, sin, chosen)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, face: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, cos, sin, ctx.face = inputs
    ctx.save_for_backward(cos, sin)


def _gradient(ctx, dy):  # type: ignore[no-untyped-def]
    dx = torch.ops.pyllm.rope_backward(dy, *ctx.saved_tensors, ctx.face)
    return dx, None, None, None


register(
    "rope",
    forward="(Tensor x, Tensor cos, Tensor sin, str face) -> Tensor",
    backward="(Tensor dy, Tensor cos, Tensor sin, str face) -> Tensor",
    fake_forward=_fake,
    fake_backward=_fake,
    setup_context=_setup_context,
    gradient=_gradient,
    faces={"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")},
)
