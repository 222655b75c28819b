r"""A linear layer whose weights are int8 (LLM.int8(), arXiv:2208.07339, sec. 2.1; ZeroQuant,
arXiv:2206.01861, sec. 4.1).

Each output channel ``f`` of the weights has a scale, and so has each token ``n`` of the activations
where these are quantised, too (W8A8): symmetric, to -127 ... 127.

.. math:: s_n = \max_d |x_{nd}| / 127, \qquad q_{nd} = \mathrm{round}(x_{nd} / s_n), \qquad
          y_{nf} = s_n\, s_f \sum_d q_{nd}\, w_{fd}

The sum is one of integers and exact: nothing is lost but by the rounding to int8. With activations
left as they are (W8A16), :math:`y_{nf} = s_f \sum_d x_{nd}\, w_{fd}`.

There is no backward: integers have no gradient.
"""

import torch
from torch import Tensor

from pyllm.reference._precision import accumulation_dtype

LARGEST = 127
"""Of an int8 to both sides; -128 is left out, so that zero is in the middle."""


def quantize_rows(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in int8, with its scale: ``(q_ND, scale_N)``, int8 and float32.

    Computed in float32 whatever the dtype. A row whose scale is below the normal numbers becomes
    zeros. So does one that is not finite, and its scale, which is not finite either, carries that
    into every result.
    """
    x_ND = x_ND.float()
    scale_N = x_ND.abs().amax(dim=1) / LARGEST
    smallest = torch.finfo(torch.float32).tiny
    inverse_N = torch.where(scale_N >= smallest, 1.0 / scale_N, 0.0)
    q_ND = (x_ND * inverse_N.unsqueeze(1)).round()
    return q_ND.nan_to_num(0.0).to(torch.int8), scale_N


def int8_linear_forward(
    x_ND: Tensor, weight_FD: Tensor, weight_scale_F: Tensor, quantize_input: bool
) -> Tensor:
    """Return ``y_NF`` in the dtype of ``x_ND``; ``weight_FD`` is int8."""
    wide = accumulation_dtype(x_ND.dtype)
    weight_scale_F = weight_scale_F.to(wide)
    if not quantize_input:
        y_NF = x_ND.to(wide) @ weight_FD.to(wide).T
        return (y_NF * weight_scale_F).to(x_ND.dtype)
    q_ND, scale_N = quantize_rows(x_ND)
    # Integers up to 2^31 are exact in float64, whose product is many times faster.
    sum_NF = q_ND.double() @ weight_FD.double().T
    scale_NF = scale_N.to(wide).unsqueeze(1) * weight_scale_F
    return (sum_NF.to(wide) * scale_NF).to(x_ND.dtype)
