"""The door of ``moe_ffn``: checks, autocast, registration, choice of face."""

import torch
from torch import Tensor

from pyllm._checks import check_choice
from pyllm.ops._checks import (
    check_floating,
    check_index_range,
    check_integer,
    check_row_count,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from pyllm.ops._registry import autocast_dtype, choose_face, register

ACTIVATIONS = ("swiglu", "gelu")


def moe_ffn(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    experts: Tensor,
    activation: str = "swiglu",
    *,
    face: str | None = None,
) -> Tensor:
    """Run each token through its chosen experts only, and sum their outputs by weight.

    ``y_n = sum_a weights[n, a] * w_out[e] @ act(w_in[e] @ x_n)`` with ``e = experts[n, a]``
    (Shazeer et al. 2017, arXiv:1701.06538; gated as in Mixtral, arXiv:2401.04088).

    Args:
        x: (N, D) floating point.
        w_in: (E, 2F, D) for ``swiglu``, gate rows first; (E, F, D) for ``gelu``.
        w_out: (E, D, F).
        weights: (N, k) floating point, as :func:`route_topk` gives them.
        experts: (N, k) int32 or int64, each in ``[0, E)``.
        activation: ``swiglu`` or ``gelu`` (tanh form).
        face: one of ``available_faces``; by default the best for the device.

    Returns:
        (N, D) in the dtype of ``x``; under autocast in the autocast dtype.

    Raises:
        ValueError: wrong shape, dtype or device, unknown activation; on the CPU also an expert
            out of range.
    """
    check_choice("moe_ffn: activation", activation, ACTIVATIONS)
    check_floating("moe_ffn", x=x, w_in=w_in, w_out=w_out, weights=weights)
    check_integer("moe_ffn", experts=experts)
    check_shape("moe_ffn", "x", x, ("N", "D"))
    check_shape("moe_ffn", "w_out", w_out, ("E", x.shape[1], "F"))
    n_experts, width, hidden = w_out.shape
    columns = 2 * hidden if activation == "swiglu" else hidden
    check_shape("moe_ffn", "w_in", w_in, (n_experts, columns, width))
    check_shape("moe_ffn", "weights", weights, (x.shape[0], "k"))
    check_shape("moe_ffn", "experts", experts, tuple(weights.shape))
    check_same_device("moe_ffn", x=x, w_in=w_in, w_out=w_out, weights=weights, experts=experts)
    check_row_count("moe_ffn", "experts", experts)
    check_index_range("moe_ffn", "experts", experts, n_experts)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    check_same_dtype("moe_ffn", x=x, w_in=w_in, w_out=w_out)
    chosen = choose_face("moe_ffn", x.device.type, face)
    return torch.ops.pyllm.moe_ffn_forward(x, w_in, w_out, weights, experts, activation, chosen)[0]


def _fake_forward(
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    experts: Tensor,
    activation: str,
    face: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_rows = experts.shape[0] * experts.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty((n_rows, w_in.shape[1])),
        experts.new_empty((n_rows,), dtype=torch.int32),
        experts.new_empty(experts.shape, dtype=torch.int32),
        experts.new_empty((w_in.shape[0] + 1,), dtype=torch.int32),
    )


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    weights: Tensor,
    pre: Tensor,
    order: Tensor,
    position: Tensor,
    offsets: Tensor,
    activation: str,
    face: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        w_in.new_empty(w_in.shape),
        w_out.new_empty(w_out.shape),
        weights.new_empty(weights.shape),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w_in, w_out, weights, _, ctx.activation, ctx.face = inputs
    ctx.save_for_backward(x, w_in, w_out, weights, *output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, dy, *_):  # type: ignore[no-untyped-def]
    gradients = torch.ops.pyllm.moe_ffn_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.face)
    return *gradients, None, None, None


register(
    "moe_ffn",
    forward=(
        "(Tensor x, Tensor w_in, Tensor w_out, Tensor weights, Tensor experts, str activation,"
        " str face) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    backward=(
        "(Tensor dy, Tensor x, Tensor w_in, Tensor w_out, Tensor weights, Tensor pre,"
        " Tensor order, Tensor position, Tensor offsets, str activation, str face)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradient=_gradient,
    faces={"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "torch", "reference")},
)
