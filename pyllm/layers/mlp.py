"""The dense feed-forward network."""

import torch.nn.functional as F
from torch import Tensor, nn

from pyllm._checks import check_choice
from pyllm.layers._checks import check_fits, check_input, check_sizes
from pyllm.ops.moe_ffn import ACTIVATIONS


class MLP(nn.Module):
    """``w_out @ act(w_in @ x)``; ``swiglu`` (arXiv:2002.05202) or ``gelu`` (tanh form).

    For ``swiglu`` the first matrix holds F gate rows, then F up rows, as the experts do.

    Raises:
        ValueError: a size below 1, an unknown activation.
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        width, hidden = check_sizes("MLP", width=width, hidden=hidden)
        check_choice("MLP: activation", activation, ACTIVATIONS)
        self.width = width
        self.gated = activation == "swiglu"
        weights = (3 if self.gated else 2) * hidden * width
        check_fits(f"MLP: {hidden:,} by {width:,}", weights, 0, "make it narrower")
        self.in_proj = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=False)
        self.out_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        check_input("MLP", x, self.width)
        return self.out_proj(activate(self.in_proj(x), self.gated))


def activate(pre: Tensor, gated: bool) -> Tensor:
    """SwiGLU of gate columns and then up columns, or GELU in its tanh form."""
    if gated:
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(pre, approximate="tanh")
