r"""Top-k routing: router logits to the experts of each token, their weights, and two statistics.

With :math:`p = \mathrm{softmax}(z)` over the E experts and the ``A`` largest kept (ties: the lower
index first), the weights are renormalised to sum to one (Mixtral, arXiv:2401.04088, sec. 2.1):

.. math:: w_{na} = p_{n,e_{na}} \Big/ \textstyle\sum_b p_{n,e_{nb}}

With a bias b the ``A`` largest of :math:`p + b` are kept; the weights are still those of p
(DeepSeek-V3, arXiv:2412.19437, eq. 16, there with sigmoids).

Load balance (Switch Transformer, arXiv:2101.03961, eq. 4 to 6), over all ``N*A`` choices, 1 when
the load is even:

.. math:: L_{bal} = E \textstyle\sum_e f_e P_e, \qquad
   f_e = \frac{\#\{(n,a): e_{na} = e\}}{NA}, \qquad P_e = \frac1N \sum_n p_{ne}

z-loss (ST-MoE, arXiv:2202.08906, eq. 5): :math:`L_z = \frac1N \sum_n (\log\sum_e e^{z_{ne}})^2`.

Backward, three terms for each row. The weights are themselves a softmax over the chosen logits, so
:math:`dz_{e_a} \mathrel{+}= w_a (dw_a - \sum_b dw_b w_b)`. The balance loss reaches z through P
only (f is a count): :math:`c_e = dL_{bal}\, E f_e / N`, :math:`dz_e \mathrel{+}= p_e (c_e - \sum_j
c_j p_j)`. The z-loss: :math:`dz_e \mathrel{+}= dL_z \, \frac2N \mathrm{lse}\; p_e`.
"""

import torch
from torch import Tensor

from pyllm.reference._precision import accumulation_dtype


def route_topk_forward(
    logits_NE: Tensor, bias_E: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(weights_NA, experts_NA, balance_loss, z_loss, tokens_per_expert_E)``.

    Arithmetic and weights are float32 (float64 for float64 logits); experts and counts are int32.
    ``bias_E`` has the dtype of the weights. With no rows both losses are 0.
    """
    n_rows, n_experts = logits_NE.shape
    z_NE = logits_NE.to(accumulation_dtype(logits_NE.dtype))
    p_NE = z_NE.softmax(-1)
    # A stable sort, not topk: topk leaves the order of ties open.
    scores_NE = z_NE if bias_E is None else p_NE + bias_E
    experts_NA = scores_NE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    # p over the sum of the chosen p, also where a bias chose experts whose p underflows to 0.
    weights_NA = z_NE.gather(1, experts_NA).softmax(-1)

    tokens_per_expert_E = torch.zeros(n_experts, dtype=torch.int64, device=z_NE.device)
    tokens_per_expert_E.scatter_add_(
        0, experts_NA.reshape(-1), torch.ones_like(experts_NA.reshape(-1))
    )
    rows = max(n_rows, 1)
    f_E = tokens_per_expert_E.to(z_NE.dtype) / (rows * top_k)
    balance_loss = n_experts * (f_E * (p_NE.sum(0) / rows)).sum()
    z_loss = z_NE.logsumexp(-1).square().sum() / rows
    return (
        weights_NA,
        experts_NA.to(torch.int32),
        balance_loss,
        z_loss,
        tokens_per_expert_E.to(torch.int32),
    )


def route_topk_backward(
    dweights_NA: Tensor,
    dbalance_loss: Tensor,
    dz_loss: Tensor,
    logits_NE: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    tokens_per_expert_E: Tensor,
) -> Tensor:
    """Return ``dlogits_NE`` in the dtype of ``logits_NE``."""
    n_rows, n_experts = logits_NE.shape
    top_k = experts_NA.shape[1]
    rows = max(n_rows, 1)
    z_NE = logits_NE.to(weights_NA.dtype)
    p_NE = z_NE.softmax(-1)

    f_E = tokens_per_expert_E.to(z_NE.dtype) / (rows * top_k)
    c_E = dbalance_loss * n_experts * f_E / rows
    dz_NE = p_NE * (c_E - (p_NE * c_E).sum(-1, keepdim=True))

    dz_NE += dz_loss * (2 / rows) * z_NE.logsumexp(-1, keepdim=True) * p_NE

    inner_N1 = (dweights_NA * weights_NA).sum(-1, keepdim=True)
    dz_NE.scatter_add_(1, experts_NA.long(), weights_NA * (dweights_NA - inner_N1))
    return dz_NE.to(logits_NE.dtype)
