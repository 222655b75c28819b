r"""Wavelengths of rotary positions, stretched for a context longer than the one trained on.

Plane ``i`` of a head of K channels turns by :math:`f_i = \theta^{-2i/K}` a position (RoFormer,
arXiv:2104.09864). A model that was trained on L positions has never seen the angles beyond L. With
``factor`` s the context becomes s L positions long:

- ``linear``: every position is divided by s (position interpolation, arXiv:2306.15595).
- ``llama3``: planes whose wavelength exceeds L are divided by s, those under L / 4 stay as they
  are, with a straight passage between them (Llama 3.1, arXiv:2407.21783; as in its code).
- ``yarn``: planes that turn fewer than once in L positions are divided by s, those over 32 times
  stay, with a ramp between them over the planes; and the logits are sharpened by
  :math:`(0.1 \ln s + 1)^2`, shared by cosines and sines (arXiv:2309.00071, sec. 3.2 to 3.4).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCALINGS = ("none", "linear", "llama3", "yarn")
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
"""Wavelengths over L / LOW are stretched in full, under L / HIGH not at all."""
YARN_FAST, YARN_SLOW = 32.0, 1.0
"""Turns in L positions over which a plane stays, and under which it is stretched in full."""


class Rotation(NamedTuple):
    """How the planes of a head turn."""

    frequency_J: Tensor
    """(K/2,) float64: radians a position."""
    magnitude: float
    """Multiplies cosines and sines."""


def rotation(
    head_dim: int,
    theta: float,
    scaling: str = "none",
    factor: float = 1.0,
    original_len: int | None = None,
) -> Rotation:
    """The turning of each plane. ``original_len`` (L) is needed by ``llama3`` and ``yarn``."""
    plane_J = torch.arange(0, head_dim, 2, dtype=torch.float64)
    frequency_J = theta ** -(plane_J / head_dim)
    if scaling == "none":
        return Rotation(frequency_J, 1.0)
    stretched_J = frequency_J / factor
    if scaling == "linear":
        return Rotation(stretched_J, 1.0)
    assert original_len is not None
    if scaling == "llama3":
        turns_J = original_len * frequency_J / (2 * math.pi)
        keep_J = ((turns_J - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
        return Rotation(stretched_J + (frequency_J - stretched_J) * keep_J, 1.0)
    first = math.floor(_plane_that_turns(YARN_FAST, head_dim, theta, original_len))
    last = math.ceil(_plane_that_turns(YARN_SLOW, head_dim, theta, original_len))
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    stretch_J = ((plane_J / 2 - first) / width).clamp(0, 1)
    magnitude = 0.1 * math.log(factor) + 1
    return Rotation(frequency_J + (stretched_J - frequency_J) * stretch_J, magnitude)


def _plane_that_turns(times: float, head_dim: int, theta: float, length: int) -> float:
    """Which plane, as a fraction, turns ``times`` in ``length`` positions."""
    # A theta of 1 turns all planes alike; the published formula then divides by zero.
    spread = max(math.log(theta), 1e-9)
    return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * spread)
