"""Attention by PyTorch's fused CPU kernel, what ``scaled_dot_product_attention`` runs there.

The fused kernel serves equal numbers of queries and keys, no window and a width it knows; every
other call is handed to the reference. It knows no grouped queries, so key and value heads are
repeated for it.
"""

import torch
from torch import Tensor

from pyllm.reference import attention as reference


def _served(q_BTHK: Tensor, k_BSGK: Tensor, scale: float, causal: bool, window: int) -> bool:
    return (
        q_BTHK.device.type == "cpu"
        and q_BTHK.numel() > 0
        and k_BSGK.numel() > 0  # the kernel divides by the number of keys
        and window == 0
        and scale > 0  # the mask's -inf is scaled too: by 0 it is NaN, by -1 it is inf
        and (not causal or q_BTHK.shape[1] == k_BSGK.shape[1])
    )


def _heads_first(x_BTHK: Tensor) -> Tensor:
    """(B, T, H, K) to (B, H, T, K); the kernel takes a last stride of 1 for granted."""
    return x_BTHK.contiguous().transpose(1, 2)


def _repeat_heads(x_BSGK: Tensor, n_heads: int) -> Tensor:
    """(B, S, G, K) to (B, H, S, K)."""
    return _heads_first(x_BSGK.repeat_interleave(n_heads // x_BSGK.shape[2], dim=2))


def attention_forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.attention.attention_forward`."""
    if not _served(q_BTHK, k_BSGK, scale, causal, window):
        return reference.attention_forward(q_BTHK, k_BSGK, v_BSGK, scale, causal, window, sinks)
    n_heads = q_BTHK.shape[2]
    y_BHTK, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _heads_first(q_BTHK),
        _repeat_heads(k_BSGK, n_heads),
        _repeat_heads(v_BSGK, n_heads),
        0.0,
        causal,
        scale=scale,
    )
    return y_BHTK.transpose(1, 2).contiguous(), lse_BHT


def attention_backward(
    dy_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    y_BTHK: Tensor,
    lse_BHT: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.attention.attention_backward`."""
    if not _served(q_BTHK, k_BSGK, scale, causal, window):
        return reference.attention_backward(
            dy_BTHK, q_BTHK, k_BSGK, v_BSGK, y_BTHK, lse_BHT, scale, causal, window, sinks
        )
    n_heads, n_kv_heads = q_BTHK.shape[2], k_BSGK.shape[2]
    dq_BHTK, dk_BHSK, dv_BHSK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _heads_first(dy_BTHK),
        _heads_first(q_BTHK),
        _repeat_heads(k_BSGK, n_heads),
        _repeat_heads(v_BSGK, n_heads),
        _heads_first(y_BTHK),
        lse_BHT,
        0.0,
        causal,
        scale=scale,
    )
    dk_BSHK, dv_BSHK = dk_BHSK.transpose(1, 2), dv_BHSK.transpose(1, 2)
    return (
        dq_BHTK.transpose(1, 2).contiguous(),
        dk_BSHK.unflatten(2, (n_kv_heads, -1)).sum(3).contiguous(),
        dv_BSHK.unflatten(2, (n_kv_heads, -1)).sum(3).contiguous(),
    )
