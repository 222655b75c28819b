"""The door of ``moe_dispatch``: checks, registration, choice of face."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyllm.ops._checks import (
    check_floating,
    check_index_range,
    check_integer,
    check_row_count,
    check_same_device,
    check_shape,
    check_whole,
)
from pyllm.ops._registry import choose_face, register

MOST_EXPERTS = 2**24
"""The sort keeps a count for each expert, whether it has rows or not."""


class Dispatch(NamedTuple):
    """Tokens in expert order, and the way back."""

    rows: Tensor
    """(N*k, D): a copy of each token for each of its experts, sorted by expert."""
    order: Tensor
    """(N*k,) int32: sorted row to slot ``token * k + choice``."""
    position: Tensor
    """(N, k) int32: the inverse of ``order``."""
    offsets: Tensor
    """(E + 1,) int32: expert ``e`` owns the rows ``offsets[e]:offsets[e + 1]``."""


def moe_dispatch(
    x: Tensor, experts: Tensor, n_experts: int, *, face: str | None = None
) -> Dispatch:
    """Copy each token to the rows of its experts by a stable counting sort; nothing is padded.

    Args:
        x: (N, D) floating point.
        experts: (N, k) int32 or int64, each in ``[0, n_experts)``.
        n_experts: E, up to 2**24.
        face: one of ``available_faces``; by default the best for the device.

    Raises:
        ValueError: wrong shape, dtype or device; on the CPU also an expert out of range.
    """
    check_floating("moe_dispatch", x=x)
    check_integer("moe_dispatch", experts=experts)
    check_shape("moe_dispatch", "x", x, ("N", "D"))
    check_shape("moe_dispatch", "experts", experts, (x.shape[0], "k"))
    check_same_device("moe_dispatch", x=x, experts=experts)
    n_experts = check_whole("moe_dispatch", "n_experts", n_experts, least=1, most=MOST_EXPERTS)
    check_row_count("moe_dispatch", "experts", experts)
    check_index_range("moe_dispatch", "experts", experts, n_experts)
    chosen = choose_face("moe_dispatch", x.device.type, face)
    return Dispatch(*torch.ops.pyllm.moe_dispatch_forward(x, experts, n_experts, chosen))


def _fake_forward(
    x: Tensor, experts: Tensor, n_experts: int, face: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rows = experts.shape[0] * experts.shape[1]
    return (
        x.new_empty((n_rows, x.shape[1])),
        experts.new_empty((n_rows,), dtype=torch.int32),
        experts.new_empty(experts.shape, dtype=torch.int32),
        experts.new_empty((n_experts + 1,), dtype=torch.int32),
    )


def _fake_backward(dx_sorted: Tensor, position: Tensor, face: str) -> Tensor:
    return dx_sorted.new_empty((position.shape[0], dx_sorted.shape[1]))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.face = inputs[3]
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, dx_sorted, *_):  # type: ignore[no-untyped-def]
    (position,) = ctx.saved_tensors
    dx = torch.ops.pyllm.moe_dispatch_backward(dx_sorted, position, ctx.face)
    return dx, None, None, None


register(
    "moe_dispatch",
    forward=(
        "(Tensor x, Tensor experts, int n_experts, str face) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    backward="(Tensor dx_sorted, Tensor position, str face) -> Tensor",
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradient=_gradient,
    faces={"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")},
)
