r"""Causal self-attention with grouped queries (Vaswani et al. 2017, arXiv:1706.03762, eq. 1; GQA:
Ainslie et al. 2023, arXiv:2305.13245; window: Beltagy et al. 2020, arXiv:2004.05150; sinks: Xiao et
al. 2023, arXiv:2309.17453).

For each query head, with key and value head :math:`g = \lfloor h G / H \rfloor`:

.. math:: S = \mathrm{scale}\; Q K^\top, \qquad P = \mathrm{softmax}(S + mask), \qquad Y = P V

The T queries are the last T of S positions: query ``t`` stands at ``S - T + t`` and sees key ``s``
when ``s <= S - T + t`` (causal) and ``s > S - T + t - window`` (window) or ``s < sinks``: the first
keys stay in sight, since a softmax puts what it has no use for on them. A row that sees nothing
gives zeros. Only the log-sum-exp L of each row is kept for the backward, as in FlashAttention-2
(arXiv:2307.08691, sec. 3.1): :math:`P = e^{S - L}`.

Backward. :math:`dV = P^\top dY`, :math:`dP = dY V^\top`, and the softmax gives
:math:`dS = P \odot (dP - \Delta)` with :math:`\Delta = \mathrm{rowsum}(dY \odot Y)`; then
:math:`dQ = \mathrm{scale}\; dS\, K`, :math:`dK = \mathrm{scale}\; dS^\top Q`. A kv head sums the
gradients of the query heads that share it.
"""

import torch
from torch import Tensor

from pyllm.reference._precision import accumulation_dtype, product_dtype


def visible(
    n_queries: int, n_keys: int, causal: bool, window: int, sinks: int, device: torch.device
) -> Tensor:
    """Boolean (T, S): may query ``t`` see key ``s``? ``window`` 0 means no window."""
    at_T1 = torch.arange(n_keys - n_queries, n_keys, device=device).unsqueeze(1)
    key_1S = torch.arange(n_keys, device=device).unsqueeze(0)
    sees_TS = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    if causal:
        sees_TS &= key_1S <= at_T1
    if window > 0:
        sees_TS &= (at_T1 - key_1S < window) | (key_1S < sinks)
    return sees_TS


def _scores(
    q_BGJTK: Tensor, k_BSGK: Tensor, scale: float, causal: bool, window: int, sinks: int
) -> Tensor:
    """Masked, scaled scores (B, G, J, T, S); J query heads share a kv head."""
    k_BG1KS = k_BSGK.permute(0, 2, 3, 1).unsqueeze(2)
    product = product_dtype(q_BGJTK.dtype)
    s_BGJTS = q_BGJTK.to(product) @ k_BG1KS.to(product)
    s_BGJTS = s_BGJTS.to(accumulation_dtype(q_BGJTK.dtype)) * scale
    n_queries, n_keys = q_BGJTK.shape[3], k_BSGK.shape[1]
    sees_TS = visible(n_queries, n_keys, causal, window, sinks, q_BGJTK.device)
    return s_BGJTS.masked_fill_(~sees_TS, float("-inf"))


def _group(x_BTHK: Tensor, n_kv_heads: int) -> Tensor:
    """(B, T, H, K) to (B, G, J, T, K)."""
    return x_BTHK.unflatten(2, (n_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _ungroup(x_BGJTK: Tensor) -> Tensor:
    return x_BGJTK.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def attention_forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """Return ``(y_BTHK, lse_BHT)``; the log-sum-exp is float32 (float64 for float64 input)."""
    q_BGJTK = _group(q_BTHK, k_BSGK.shape[2])
    s_BGJTS = _scores(q_BGJTK, k_BSGK, scale, causal, window, sinks)
    # The largest score is taken off first, so that large scores keep their digits. Where a row sees
    # nothing it is -inf, and exp(-inf - -inf) would be NaN: clamped, the row's sum is 0.
    if s_BGJTS.shape[-1] == 0:
        largest_BGJT1 = s_BGJTS.new_zeros((*s_BGJTS.shape[:-1], 1))
    else:
        largest_BGJT1 = s_BGJTS.amax(-1, keepdim=True)
    largest_BGJT1 = largest_BGJT1.clamp_min(torch.finfo(s_BGJTS.dtype).min)
    e_BGJTS = (s_BGJTS - largest_BGJT1).exp()
    sum_BGJT1 = e_BGJTS.sum(-1, keepdim=True)
    lse_BGJT = (largest_BGJT1 + sum_BGJT1.log()).squeeze(-1)
    p_BGJTS = e_BGJTS / sum_BGJT1.where(sum_BGJT1 != 0, 1.0)
    v_BG1SK = v_BSGK.transpose(1, 2).unsqueeze(2)
    y_BGJTK = p_BGJTS.to(v_BSGK.dtype) @ v_BG1SK
    return _ungroup(y_BGJTK), lse_BGJT.flatten(1, 2).contiguous()


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
    """Return ``(dq, dk, dv)`` in the shapes and dtypes of ``q``, ``k`` and ``v``."""
    n_kv_heads = k_BSGK.shape[2]
    wide = lse_BHT.dtype
    q_BGJTK, dy_BGJTK = _group(q_BTHK, n_kv_heads), _group(dy_BTHK, n_kv_heads)
    lse_BGJT1 = lse_BHT.unflatten(1, (n_kv_heads, -1)).unsqueeze(-1)
    s_BGJTS = _scores(q_BGJTK, k_BSGK, scale, causal, window, sinks)
    p_BGJTS = (s_BGJTS - lse_BGJT1.clamp_min(torch.finfo(wide).min)).exp()

    v_BG1KS = v_BSGK.permute(0, 2, 3, 1).unsqueeze(2)
    dp_BGJTS = (dy_BGJTK @ v_BG1KS).to(wide)
    delta_BGJT1 = _group((dy_BTHK.to(wide) * y_BTHK.to(wide)).sum(-1, keepdim=True), n_kv_heads)
    ds_BGJTS = (p_BGJTS * (dp_BGJTS - delta_BGJT1) * scale).to(q_BTHK.dtype)

    dq_BGJTK = ds_BGJTS @ k_BSGK.transpose(1, 2).unsqueeze(2)
    dk_BGJSK = ds_BGJTS.transpose(-1, -2) @ q_BGJTK
    dv_BGJSK = p_BGJTS.to(dy_BTHK.dtype).transpose(-1, -2) @ dy_BGJTK
    return (
        _ungroup(dq_BGJTK),
        dk_BGJSK.sum(2).transpose(1, 2).contiguous(),
        dv_BGJSK.sum(2).transpose(1, 2).contiguous(),
    )
