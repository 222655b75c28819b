r"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, eq. 34), in Llama's layout.

Channel ``i`` of the first half of a head and channel ``i`` of the second form a plane, turned by
the angle :math:`\theta_{t,i} = t\,\theta^{-2i/K}` given as a table of cosines and sines:

.. math:: (a, b) \mapsto (a\cos - b\sin,\; a\sin + b\cos)

The backward turns the gradient by the opposite angle.
"""

from torch import Tensor, cat

from pyllm.reference._precision import accumulation_dtype


def _turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = accumulation_dtype(x_BTHK.dtype)
    # (T, K/2) or (B, T, K/2) to (..., T, 1, K/2): every head turns alike.
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    a, b = x_BTHK.to(wide).chunk(2, dim=-1)
    return cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_BTHK.dtype)


def rope_forward(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``y_BTHK``; ``cos`` and ``sin`` are (T, K/2), or (B, T, K/2) for ragged batches."""
    return _turn(x_BTHK, cos, sin)


def rope_backward(dy_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``dx_BTHK``."""
    return _turn(dy_BTHK, cos, -sin)
