"""RMSNorm by ``aten::_fused_rms_norm``, what ``torch.nn.functional.rms_norm`` runs in training."""

import torch
from torch import Tensor


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.rms_norm.rms_norm_forward`."""
    y, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight.to(x.dtype), eps)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, rstd.squeeze(-1).to(wide)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.rms_norm.rms_norm_backward`."""
    dx, dweight = torch.ops.aten._fused_rms_norm_backward(
        dy, x, [x.shape[-1]], rstd.unsqueeze(-1), weight.to(x.dtype), [True, True]
    )
    return dx, dweight.to(weight.dtype)
