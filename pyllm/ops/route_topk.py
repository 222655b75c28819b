"""The door of ``route_topk``: checks, registration, choice of face."""

from typing import NamedTuple

import torch
from torch import Tensor

from pyllm.ops._checks import (
    check_floating,
    check_same_device,
    check_shape,
    check_whole,
)
from pyllm.ops._registry import choose_face, register


class Routing(NamedTuple):
    """Where each token goes, and how even the load is."""

    weights: Tensor
    """(N, k) float32: weights of the chosen experts, each row sums to one."""
    experts: Tensor
    """(N, k) int32: indices of the chosen experts, the largest probability first; with a bias, the
    largest sum of probability and bias, which need not be the one with the largest weight."""
    balance_loss: Tensor
    """Scalar: Switch Transformer's load-balancing loss; 1 when the load is even."""
    z_loss: Tensor
    """Scalar: mean squared log-sum-exp of the logits."""
    tokens_per_expert: Tensor
    """(E,) int32: how many of the ``N*k`` choices fell on each expert."""


def route_topk(
    logits: Tensor, top_k: int, *, bias: Tensor | None = None, face: str | None = None
) -> Routing:
    """Choose ``top_k`` experts per token by softmax, weights renormalised over the chosen.

    Mixtral's routing (arXiv:2401.04088, sec. 2.1) with the balance loss of Switch Transformer
    (arXiv:2101.03961, eq. 4) and the z-loss of ST-MoE (arXiv:2202.08906, eq. 5). Ties go to the
    lower index.

    Args:
        logits: (N, E) floating point; computed in float32 or wider.
        top_k: experts per token, 1 to E.
        bias: (E,) added to the probabilities when the experts are chosen, and only then
            (DeepSeek-V3, arXiv:2412.19437, eq. 16). No gradient flows into it.
        face: one of ``available_faces``; by default the best for the device.

    Raises:
        ValueError: wrong shape, dtype or device, or ``top_k`` outside of 1 to E.
    """
    check_floating("route_topk", logits=logits)
    check_shape("route_topk", "logits", logits, ("N", "E"))
    top_k = check_whole("route_topk", "top_k", top_k, least=1)
    if top_k > logits.shape[1]:
        raise ValueError(
            f"route_topk: top_k must be at most the number of experts ({logits.shape[1]}), "
            f"got {top_k}"
        )
    if bias is not None:
        check_floating("route_topk", bias=bias)
        check_shape("route_topk", "bias", bias, (logits.shape[1],))
        check_same_device("route_topk", logits=logits, bias=bias)
        bias = bias.detach().to(_wide(logits.dtype))
    chosen = choose_face("route_topk", logits.device.type, face)
    return Routing(*torch.ops.pyllm.route_topk_forward(logits, bias, top_k, chosen))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake_forward(
    logits: Tensor, bias: Tensor | None, top_k: int, face: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(logits.dtype)
    n_rows, n_experts = logits.shape
    return (
        logits.new_empty((n_rows, top_k), dtype=wide),
        logits.new_empty((n_rows, top_k), dtype=torch.int32),
        logits.new_empty((), dtype=wide),
        logits.new_empty((), dtype=wide),
        logits.new_empty((n_experts,), dtype=torch.int32),
    )


def _fake_backward(
    dweights: Tensor,
    dbalance_loss: Tensor,
    dz_loss: Tensor,
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    tokens_per_expert: Tensor,
    face: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, _, _, ctx.face = inputs
    weights, experts, _, _, tokens_per_expert = output
    ctx.save_for_backward(logits, weights, experts, tokens_per_expert)
    ctx.mark_non_differentiable(experts, tokens_per_expert)


def _gradient(ctx, dweights, _dexperts, dbalance_loss, dz_loss, _dcounts):  # type: ignore[no-untyped-def]
    dlogits = torch.ops.pyllm.route_topk_backward(
        dweights, dbalance_loss, dz_loss, *ctx.saved_tensors, ctx.face
    )
    return dlogits, None, None, None


register(
    "route_topk",
    forward=(
        "(Tensor logits, Tensor? bias, int top_k, str face)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    backward=(
        "(Tensor dweights, Tensor dbalance_loss, Tensor dz_loss, Tensor logits, Tensor weights,"
        " Tensor experts, Tensor tokens_per_expert, str face) -> Tensor"
    ),
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    gradient=_gradient,
    faces={"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")},
)
