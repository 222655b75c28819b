r"""RMSNorm: rows scaled to unit root mean square (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).

.. math:: y_i = x_i \, r \, w_i, \qquad r = \frac{1}{\sqrt{\frac{1}{D}\sum_j x_j^2 + \epsilon}}

Backward. With :math:`\hat x = x r` and :math:`g = dy \odot w`, the chain rule gives two paths from
:math:`x_i` to the loss: directly, and through :math:`r`, whose derivative is
:math:`\partial r / \partial x_i = -r^3 x_i / D`. Together:

.. math:: dx = r \, (g - \hat x \, \tfrac{1}{D}\textstyle\sum_j g_j \hat x_j), \qquad
          dw = \textstyle\sum_{rows} dy \odot \hat x
"""

import torch
from torch import Tensor

from pyllm.reference._precision import accumulation_dtype


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``(y, rstd)``.

    ``x`` (..., D), ``weight`` (D,); ``y`` has the shape and dtype of ``x``, ``rstd`` (...) is
    float32 (float64 for float64 input).
    """
    wide = accumulation_dtype(x.dtype)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.square().mean(-1) + eps)
    y = x_wide * rstd.unsqueeze(-1) * weight.to(wide)
    return y.to(x.dtype), rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(dx, dweight)`` in the dtypes of ``x`` and ``weight``."""
    wide = rstd.dtype
    dy_wide = dy.to(wide)
    x_hat = x.to(wide) * rstd.unsqueeze(-1)
    g = dy_wide * weight.to(wide)
    dx = rstd.unsqueeze(-1) * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    dweight = (dy_wide * x_hat).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)
