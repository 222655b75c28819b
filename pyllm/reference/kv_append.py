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

There is no backward: a cache is for inference.
"""

import torch
from torch import Tensor


def slots_of(position: Tensor, n_slots: int, sinks: int, rolling: bool) -> Tensor:
    """The slot of each position."""
    if not rolling:
        return position
    return position.where(position < sinks, sinks + (position - sinks) % (n_slots - sinks))


def kv_append_forward(
    k_cache_BSGK: Tensor,
    v_cache_BSGK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    starts_B: Tensor,
    counts_B: Tensor,
    sinks: int,
    rolling: bool,
) -> None:
    """Write to both caches, in place."""
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
    k_cache_BSGK[row_N, slot_N] = k_BTGK[row_N, token_N]
    v_cache_BSGK[row_N, slot_N] = v_BTGK[row_N, token_N]
