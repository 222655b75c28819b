"""The experts of few rows, as a decoding step has them: their matrices gathered, batched products.

The reference asks the device how many rows each expert got and waits for the answer, which a CUDA
graph cannot do. Here nothing depends on that, at the price of a copy of each row's matrices; more
rows than pay for it are handed to the reference, and so is the backward.
"""

import torch
from torch import Tensor

from pyllm.reference import moe_ffn as reference
from pyllm.reference.moe_combine import moe_combine_forward
from pyllm.reference.moe_dispatch import sort_by_expert

FEW_ROWS = 32
"""Choices of experts, all tokens together. Of 1.3M weights each in half precision, their copies
take 85 MB."""


def moe_ffn_forward(
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_ffn.moe_ffn_forward`."""
    if not 0 < experts_NA.numel() <= FEW_ROWS:
        return reference.moe_ffn_forward(
            x_ND, w_in_EFD, w_out_EDF, weights_NA, experts_NA, activation
        )
    order_R, position_NA, offsets_E1 = sort_by_expert(experts_NA, w_in_EFD.shape[0])
    slots_R = order_R.long()
    expert_R = experts_NA.reshape(-1)[slots_R].long()
    x_RD = x_ND[slots_R // experts_NA.shape[1]]
    pre_RF = torch.bmm(w_in_EFD[expert_R], x_RD.unsqueeze(-1)).squeeze(-1)
    h_RF = reference.activation_forward(pre_RF, activation)
    y_RD = torch.bmm(w_out_EDF[expert_R], h_RF.unsqueeze(-1)).squeeze(-1)
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
    """See :func:`pyllm.reference.moe_ffn.moe_ffn_backward`."""
    return reference.moe_ffn_backward(
        dy_ND,
        x_ND,
        w_in_EFD,
        w_out_EDF,
        weights_NA,
        pre_RF,
        order_R,
        position_NA,
        offsets_E1,
        activation,
    )
