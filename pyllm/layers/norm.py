"""Normalisation of the residual stream."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyllm._checks import check_number
from pyllm.layers._checks import check_fits, check_input, check_sizes
from pyllm.ops import rms_norm


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = _checked_eps("RMSNorm", width, eps)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in the dtype of ``x``."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = _checked_eps("LayerNorm", width, eps)
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in the dtype of ``x``."""
        check_input("LayerNorm", x, self.weight.shape[0])
        return F.layer_norm(
            x, (x.shape[-1],), self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


def _checked_eps(layer: str, width: int, eps: float) -> float:
    (width,) = check_sizes(layer, width=width)
    check_fits(f"{layer}: a width of {width:,}", 2 * width, 0, "make it narrower")
    return check_number(f"{layer}: eps", eps, 0, above=True)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
