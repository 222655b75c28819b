r"""Attention of few new queries to a kv cache, contiguous or rolling, in a ragged batch.

The same softmax as :mod:`pyllm.reference.attention`, over the keys that the cache holds (the slots
of a rolling cache are explained in :mod:`pyllm.reference.kv_append`):

.. math:: y_t = \sum_{p \in V_t} \frac{e^{s_{tp}}}{\sum_{r \in V_t} e^{s_{tr}}}\, v_p, \qquad
          s_{tp} = \mathrm{scale}\; q_t \cdot k_p

Query ``t`` of row ``b`` stands at position :math:`a = starts_b + t`; its own key and value are in
the cache already. It sees

.. math:: V_t = \{p \le a : p > a - window \;\text{ or }\; p < sinks\}

that is a sliding window (Mistral 7B, arXiv:2310.06825, sec. 2) and the attention sinks
(StreamingLLM, arXiv:2309.17453). Query head ``h`` reads kv head :math:`\lfloor h G / H \rfloor`.
Rows from ``counts[b]`` on are padding and give zeros. The keys and values of an int8 cache are its
integers times the scale of their position and head, as :mod:`pyllm.reference.kv_append` made them;
where that is not finite, NaN.

There is no backward: a cache is for inference.
"""

import torch
from torch import Tensor

from pyllm.reference._precision import accumulation_dtype


def held_positions(end_B1: Tensor, n_slots: int, sinks: int, rolling: bool) -> Tensor:
    """(B, S) or (S,): the position in each slot once those before ``end`` were written.

    A slot that was never written gets one that is not before ``end``.
    """
    slot_S = torch.arange(n_slots, device=end_B1.device)
    if not rolling:
        return slot_S
    # Of slot, slot + ring, slot + 2 ring ... the last one before the end.
    last_BS = end_B1 - 1 - (end_B1 - 1 - slot_S) % (n_slots - sinks)
    return slot_S.where(slot_S < sinks, last_BS).where(last_BS >= slot_S, end_B1)


def widened(cache_BSGK: Tensor, scales_BSG: Tensor | None, wide: torch.dtype) -> Tensor:
    """What a cache holds, in ``wide``."""
    if scales_BSG is None:
        return cache_BSGK.to(wide)
    scales_BSG = scales_BSG.to(wide).where(scales_BSG.isfinite(), float("nan"))
    return scales_BSG.unsqueeze(-1) * cache_BSGK


def decode_attention_forward(
    q_BTHK: Tensor,
    k_cache_BSGK: Tensor,
    v_cache_BSGK: Tensor,
    starts_B: Tensor,
    counts_B: Tensor,
    scale: float,
    window: int,
    sinks: int,
    rolling: bool,
    k_scales_BSG: Tensor | None,
    v_scales_BSG: Tensor | None,
) -> Tensor:
    """Return ``y_BTHK``; ``window`` 0 means no window. The scales are those of an int8 cache."""
    wide = accumulation_dtype(q_BTHK.dtype)
    k_BSGK = widened(k_cache_BSGK, k_scales_BSG, wide)
    all_v_BSGK = widened(v_cache_BSGK, v_scales_BSG, wide)
    n_kv_heads = k_cache_BSGK.shape[2]
    start_B1 = starts_B.unsqueeze(1)
    end_B1 = start_B1 + counts_B.unsqueeze(1)
    held_BS = held_positions(end_B1, k_cache_BSGK.shape[1], sinks, rolling)
    q_BTGJK = q_BTHK.unflatten(2, (n_kv_heads, -1))
    y_BTGJK = torch.empty_like(q_BTGJK, memory_format=torch.contiguous_format)
    # One query after the other, so that what it does not see can be taken out of the cache for it:
    # that may be a NaN of stale memory, and times a weight of 0 it would still be NaN.
    for t in range(q_BTHK.shape[1]):
        at_B1 = start_B1 + t
        sees_BS = (held_BS <= at_B1) & (at_B1 < end_B1)
        if window > 0:
            sees_BS &= (at_B1 - held_BS < window) | (held_BS < sinks)
        hidden_BS11 = ~sees_BS[..., None, None]
        v_BSGK = all_v_BSGK.masked_fill(hidden_BS11, 0)
        s_BSGJ = torch.einsum("bgjk,bsgk->bsgj", q_BTGJK[:, t].to(wide), k_BSGK)
        s_BSGJ = (s_BSGJ * scale).masked_fill(hidden_BS11, float("-inf"))
        # As in reference/attention.py: a row that sees nothing gives 0, not NaN.
        largest_B1GJ = s_BSGJ.amax(1, keepdim=True).clamp_min(torch.finfo(wide).min)
        e_BSGJ = (s_BSGJ - largest_B1GJ).exp()
        sum_B1GJ = e_BSGJ.sum(1, keepdim=True)
        p_BSGJ = e_BSGJ / sum_B1GJ.where(sum_B1GJ != 0, 1.0)
        y_BTGJK[:, t] = torch.einsum("bsgj,bsgk->bgjk", p_BSGJ, v_BSGK)
    return y_BTGJK.flatten(2, 3)
