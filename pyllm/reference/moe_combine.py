r"""Combine: each token's output is the weighted sum of its experts' rows.

.. math:: y_n = \textstyle\sum_a w_{na}\, y'_{position_{na}}, \qquad
          dy'_{position_{na}} = w_{na}\, dy_n, \qquad
          dw_{na} = \langle dy_n, y'_{position_{na}}\rangle
"""

import torch
from torch import Tensor

from pyllm.reference._precision import accumulation_dtype


def moe_combine_forward(y_RD: Tensor, weights_NA: Tensor, position_NA: Tensor) -> Tensor:
    """Return ``y_ND`` in the dtype of ``y_RD``; the sum is taken in float32 or wider."""
    wide = accumulation_dtype(y_RD.dtype)
    rows_NAD = y_RD[position_NA.long()].to(wide)
    return (rows_NAD * weights_NA.to(wide).unsqueeze(-1)).sum(1).to(y_RD.dtype)


def moe_combine_backward(
    dy_ND: Tensor, y_RD: Tensor, weights_NA: Tensor, position_NA: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``(dy_RD, dweights_NA)`` in the dtypes of ``y_RD`` and ``weights_NA``."""
    wide = accumulation_dtype(y_RD.dtype)
    dy_N1D = dy_ND.to(wide).unsqueeze(1)
    dy_NAD = dy_N1D * weights_NA.to(wide).unsqueeze(-1)
    # `position` is a permutation of the rows: each is written exactly once.
    dy_RD = torch.empty_like(y_RD)
    dy_RD[position_NA.reshape(-1).long()] = dy_NAD.flatten(0, 1).to(y_RD.dtype)
    dweights_NA = (dy_N1D * y_RD[position_NA.long()].to(wide)).sum(-1)
    return dy_RD, dweights_NA.to(weights_NA.dtype)
