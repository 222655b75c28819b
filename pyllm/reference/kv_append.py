r"""New keys and values into a cache: contiguous, or rolling with attention sinks.

A cache has S slots for each row of the batch. A contiguous one keeps position ``p`` in slot ``p``.
A rolling one is a ring buffer (Mistral 7B, arXiv:2310.06825, sec. 2), so that its memory does not
grow with the text, behind slots of their own for the first ``sinks`` positions, which a model goes
on looking at long after they have left the window (StreamingLLM, arXiv:2309.17453, sec. 3.2):

.. math:: \mathrm{slot}(p) = p \;\text{ if } p < sinks, \qquad
          \mathrm{slot}(p) = sinks + (p - sinks) \bmod (S - sinks) \;\text{ otherwise}

Row ``b`` gets the first ``counts[b]`` of the T new positions, from ``starts[b]`` on. Of more than
the ring holds, only the last are written. Unlike StreamingLLM, which numbers what is left in the
cache anew, keys keep the position they were computed at.

An int8 cache keeps the K channels of each position and kv head as integers with one float32 scale
for them, (B, S, G) scales for the keys and as many for the values, which is about half the memory
of bfloat16:

.. math:: s = \max_c |x_c| / 127, \qquad q_c = \mathrm{round}(x_c / s), \qquad x_c \approx s\, q_c

by the rule of :func:`pyllm.reference.int8_linear.quantize_rows`: zeros give zeros and the scale 0;
a row that is not finite gives zeros and a scale that is not, so that it comes back as NaN.

There is no backward: a cache is for inference.
"""

import torch
from torch import Tensor

from pyllm.reference.int8_linear import quantize_rows


def slots_of(position: Tensor, n_slots: int, sinks: int, rolling: bool) -> Tensor:
    """The slot of each position."""
    if not rolling:
        return position
    return position.where(position < sinks, sinks + (position - sinks) % (n_slots - sinks))


def quantize_heads(x_NGK: Tensor) -> tuple[Tensor, Tensor]:
    """Each head of each position in int8, with its scale: ``(q_NGK, scale_NG)``, float32."""
    q_RK, scale_R = quantize_rows(x_NGK.flatten(0, 1))
    return q_RK.view(x_NGK.shape), scale_R.view(x_NGK.shape[:2])


def kv_append_forward(
    k_cache_BSGK: Tensor,
    v_cache_BSGK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    starts_B: Tensor,
    counts_B: Tensor,
    sinks: int,
    rolling: bool,
    k_scales_BSG: Tensor | None,
    v_scales_BSG: Tensor | None,
) -> None:
    """Write to both caches, in place, and to the scales of int8 ones."""
    n_slots, n_tokens = k_cache_BSGK.shape[1], k_BTGK.shape[1]
    start_B1 = starts_B.unsqueeze(1)
    end_B1 = start_B1 + counts_B.unsqueeze(1)
    position_BT = start_B1 + torch.arange(n_tokens, device=starts_B.device)
    kept_BT = position_BT < end_B1
    if rolling:
        # Where two share a slot, PyTorch does not say which write stays.
        oldest_B1 = end_B1 - (n_slots - sinks)
        kept_BT &= (position_BT < sinks) | (position_BT >= oldest_B1)
    row_N, token_N = kept_BT.nonzero(as_tuple=True)
    slot_N = slots_of(position_BT, n_slots, sinks, rolling)[row_N, token_N]

    def write(cache_BSGK: Tensor, scales_BSG: Tensor | None, x_NGK: Tensor) -> None:
        if scales_BSG is not None:
            x_NGK, scale_NG = quantize_heads(x_NGK)
            scales_BSG[row_N, slot_N] = scale_NG.to(scales_BSG.dtype)
        cache_BSGK[row_N, slot_N] = x_NGK

    write(k_cache_BSGK, k_scales_BSG, k_BTGK[row_N, token_N])
    write(v_cache_BSGK, v_scales_BSG, v_BTGK[row_N, token_N])
