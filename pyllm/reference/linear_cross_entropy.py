r"""The output projection and the cross-entropy in one, without ever holding all the logits.

.. math:: \ell_n = \log\textstyle\sum_v e^{z_{nv}} - z_{n,t_n}, \qquad
          z_{nv} = \langle x_n, w_v\rangle

A model with 50,257 words and 4,096 tokens has 0.8 GB of logits, and as much again of gradient. So
rows are taken ``CHUNK`` at a time, the log-sum-exp is kept, and the backward computes each chunk of
logits once more (Cut Cross-Entropy, arXiv:2411.09009, keeps as little):

.. math:: dz_{nv} = d\ell_n\,(e^{z_{nv} - lse_n} - [v = t_n]), \qquad
          dx = dz\,W, \qquad dW = dz^\top x

The loss is per row, so that a policy gradient can weight each token on its own.
"""

import torch
from torch import Tensor

from pyllm.reference._precision import accumulation_dtype, product_dtype

CHUNK = 512
"""Rows at a time: 512 rows of 4,096 bfloat16 logits are 4 MB and stay in the second-level cache."""


def linear_cross_entropy_forward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return ``(loss_N, lse_N)``, float32 (float64 for float64 input).

    A row whose target is ``ignore_index`` has loss 0.
    """
    wide = accumulation_dtype(x_ND.dtype)
    product = product_dtype(x_ND.dtype)
    loss_N = torch.empty(x_ND.shape[0], dtype=wide, device=x_ND.device)
    lse_N = torch.empty_like(loss_N)
    for start in range(0, x_ND.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        z_CV = (x_ND[rows].to(product) @ weight_VD.t().to(product)).to(wide)
        targets_C = targets_N[rows]
        counted_C = targets_C != ignore_index
        picked_C = z_CV.gather(1, targets_C.where(counted_C, 0).unsqueeze(1)).squeeze(1)
        lse_N[rows] = z_CV.logsumexp(-1)
        loss_N[rows] = (lse_N[rows] - picked_C).where(counted_C, 0.0)
    return loss_N, lse_N


def linear_cross_entropy_backward(
    dloss_N: Tensor,
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return ``(dx_ND, dweight_VD)``; ``dweight`` is summed in float32 or wider."""
    wide = lse_N.dtype
    product = product_dtype(x_ND.dtype)
    dx_ND = torch.empty_like(x_ND)
    dweight_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)
    for start in range(0, x_ND.shape[0], CHUNK):
        rows = slice(start, start + CHUNK)
        z_CV = (x_ND[rows].to(product) @ weight_VD.t().to(product)).to(wide)
        targets_C = targets_N[rows]
        counted_C = targets_C != ignore_index
        dz_CV = (z_CV - lse_N[rows].unsqueeze(1)).exp_()
        one_C1 = torch.ones_like(lse_N[rows]).unsqueeze(1)
        dz_CV.scatter_add_(1, targets_C.where(counted_C, 0).unsqueeze(1), -one_C1)
        dz_CV *= dloss_N[rows].where(counted_C, 0.0).unsqueeze(1)
        dz_CV = dz_CV.to(x_ND.dtype)
        torch.mm(dz_CV, weight_VD, out=dx_ND[rows])
        dweight_VD += dz_CV.t() @ x_ND[rows]
    return dx_ND, dweight_VD.to(weight_VD.dtype)
