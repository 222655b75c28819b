r"""The expert feed-forward network of a sparse mixture of experts (Shazeer et al. 2017,
arXiv:1701.06538, eq. 1; gated as in Mixtral, arXiv:2401.04088). Only the chosen experts run.

For token ``n`` with experts :math:`e_{na}` and weights :math:`w_{na}`:

.. math:: y_n = \textstyle\sum_a w_{na} W^{out}_{e} \, \phi(W^{in}_{e} x_n), \quad e = e_{na}

``swiglu``: :math:`W^{in}` holds F gate rows, then F up rows; :math:`\phi(g, u) =
\mathrm{silu}(g)\,u` (arXiv:2002.05202, eq. 6). ``gelu``: :math:`\phi` is GELU in its tanh form
(arXiv:1606.08415, sec. 2).

Tokens are sorted by expert, so that each expert is two ordinary matrix products. Saved for the
backward: x, the pre-activation (sorted) and the int32 routing; the experts' outputs are not kept.
The gradient of a routing weight comes from the hidden row instead:
:math:`dw_{na} = \langle dy_n, W^{out} h_r\rangle = \langle W^{out\top} dy_n, h_r \rangle`, and the
left factor is needed for dh anyway (SonicMoE, arXiv:2512.14080, sec. 3).

Each expert's gradient is written into its own slice of one buffer. Indexing ``w[e]`` under autograd
would make a full-size zero gradient for every expert instead.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyllm.reference.moe_combine import moe_combine_forward
from pyllm.reference.moe_dispatch import moe_dispatch_backward, sort_by_expert

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def activation_forward(pre_RF: Tensor, activation: str) -> Tensor:
    """Pre-activation (R, 2F) or (R, F) to hidden rows (R, F)."""
    if activation == "swiglu":
        gate_RF, up_RF = pre_RF.chunk(2, dim=-1)
        return F.silu(gate_RF) * up_RF
    return F.gelu(pre_RF, approximate="tanh")


def activation_backward(dh_RF: Tensor, pre_RF: Tensor, activation: str) -> Tensor:
    """Gradient of the hidden rows to the gradient of the pre-activation."""
    if activation == "swiglu":
        gate_RF, up_RF = pre_RF.chunk(2, dim=-1)
        s_RF = torch.sigmoid(gate_RF)
        dgate_RF = dh_RF * up_RF * s_RF * (1 + gate_RF * (1 - s_RF))
        return torch.cat([dgate_RF, dh_RF * gate_RF * s_RF], dim=-1)
    t_RF = torch.tanh(_GELU_SCALE * (pre_RF + _GELU_CUBIC * pre_RF**3))
    slope_RF = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * pre_RF.square())
    return dh_RF * 0.5 * (1 + t_RF + pre_RF * (1 - t_RF.square()) * slope_RF)


def moe_ffn_forward(
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(y_ND, pre_RF, order_R, position_NA, offsets_E1)``.

    ``w_in`` is (E, 2F, D) for ``swiglu`` and (E, F, D) for ``gelu``; ``pre`` has as many columns.
    """
    n_experts, top_k = w_in_EFD.shape[0], experts_NA.shape[1]
    order_R, position_NA, offsets_E1 = sort_by_expert(experts_NA, n_experts)
    x_RD = x_ND[order_R.long() // top_k]
    pre_RF = x_ND.new_empty(x_RD.shape[0], w_in_EFD.shape[1])
    y_RD = torch.empty_like(x_RD)
    bounds = offsets_E1.tolist()
    for e in range(n_experts):
        rows = slice(bounds[e], bounds[e + 1])
        torch.mm(x_RD[rows], w_in_EFD[e].t(), out=pre_RF[rows])
        h_rows = activation_forward(pre_RF[rows], activation)
        torch.mm(h_rows, w_out_EDF[e].t(), out=y_RD[rows])
    y_ND = moe_combine_forward(y_RD, weights_NA, position_NA)
    return y_ND, pre_RF, order_R, position_NA, offsets_E1


def moe_ffn_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    pre_RF: Tensor,
    order_R: Tensor,
    position_NA: Tensor,
    offsets_E1: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(dx_ND, dw_in, dw_out, dweights_NA)`` in the dtypes of their inputs."""
    n_experts, top_k = w_in_EFD.shape[0], weights_NA.shape[1]
    slots_R = order_R.long()
    x_RD = x_ND[slots_R // top_k]
    dy_RD = dy_ND[slots_R // top_k]  # not yet weighted
    w_R1 = weights_NA.reshape(-1)[slots_R].unsqueeze(-1)
    dx_RD = torch.empty_like(x_RD)
    dw_in, dw_out = torch.empty_like(w_in_EFD), torch.empty_like(w_out_EDF)
    dweights_R = torch.empty_like(w_R1[:, 0])
    bounds = offsets_E1.tolist()
    for e in range(n_experts):
        rows = slice(bounds[e], bounds[e + 1])
        h_rows = activation_forward(pre_RF[rows], activation)
        dh_unweighted = dy_RD[rows] @ w_out_EDF[e]
        dweights_R[rows] = (dh_unweighted.to(w_R1.dtype) * h_rows).sum(-1)
        weighted_dy = (dy_RD[rows] * w_R1[rows]).to(dy_RD.dtype)
        torch.mm(weighted_dy.t(), h_rows, out=dw_out[e])
        dh_rows = (dh_unweighted * w_R1[rows]).to(pre_RF.dtype)
        dpre_rows = activation_backward(dh_rows, pre_RF[rows], activation)
        torch.mm(dpre_rows.t(), x_RD[rows], out=dw_in[e])
        torch.mm(dpre_rows, w_in_EFD[e], out=dx_RD[rows])
    dx_ND = moe_dispatch_backward(dx_RD, position_NA)
    dweights_NA = dweights_R[position_NA.long()]
    return dx_ND, dw_in, dw_out, dweights_NA
