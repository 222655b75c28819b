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

from torch import Tensor

from pyllm.reference.decode_attention import held_positions
from pyllm.reference.int8_linear import quantize_rows


def quantize_heads(x_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    """Each head of each position in int8, with its scale: ``(q_BTGK, scale_BTG)``, float32."""
    q_RK, scale_R = quantize_rows(x_BTGK.flatten(0, 2))
    return q_RK.view(x_BTGK.shape), scale_R.view(x_BTGK.shape[:3])


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
    """Write to both caches, in place, and to the scales of int8 ones.

    From the slots' side: each asks which position it holds in the end, and takes that one's token
    if it is new. So no slot is written twice, and nothing waits for the device: which tokens are
    padding is not known to the host.
    """
    n_slots, n_tokens = k_cache_BSGK.shape[1], k_BTGK.shape[1]
    if not n_tokens:
        return
    start_B1 = starts_B.unsqueeze(1)
    end_B1 = start_B1 + counts_B.unsqueeze(1)
    held_BS = held_positions(end_B1, n_slots, sinks, rolling)
    new_BS = (held_BS >= start_B1) & (held_BS < end_B1)
    token_BS = (held_BS - start_B1).clamp(0, n_tokens - 1)

    def put(cache: Tensor, x: Tensor) -> None:
        trailing = (1,) * (x.dim() - 2)
        fresh = x.take_along_dim(token_BS.unflatten(1, (-1, *trailing)), dim=1)
        cache.copy_(fresh.where(new_BS.unflatten(1, (-1, *trailing)), cache))

    def write(cache_BSGK: Tensor, scales_BSG: Tensor | None, x_BTGK: Tensor) -> None:
        if scales_BSG is not None:
            x_BTGK, scale_BTG = quantize_heads(x_BTGK)
            put(scales_BSG, scale_BTG.to(scales_BSG.dtype))
        put(cache_BSGK, x_BTGK)

    write(k_cache_BSGK, k_scales_BSG, k_BTGK)
    write(v_cache_BSGK, v_scales_BSG, v_BTGK)
