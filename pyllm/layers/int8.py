"""Layers whose weights are int8, with a float32 scale for each output channel; for inference only.

Their activations are quantised, too, row by row: see :func:`pyllm.ops.int8_linear`.
"""

import torch
from torch import Tensor, nn

from pyllm.layers._buffers import Float32Buffers
from pyllm.layers.mlp import activate
from pyllm.layers.moe import MoE
from pyllm.ops import int8_linear

SCALE = "_scale"
"""The scales of a tensor have its name with this behind it."""

FEW_ROWS = 32
"""Choices of experts that are run one by one. Of 1.3M weights each, their copies take 42 MB."""


def project(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """:func:`pyllm.ops.int8_linear` of (..., D): to (..., F)."""
    y = int8_linear(x.flatten(0, -2), weight, weight_scale)
    return y.view(*x.shape[:-1], y.shape[-1])


class Int8Linear(Float32Buffers):
    """``x @ (weight * weight_scale[:, None]).T``; (..., D) to (..., F).

    Attributes:
        weight: (F, D) int8.
        weight_scale: (F,) float32.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(features, width, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., F), in the dtype of ``x``."""
        return project(x, self.weight, self.weight_scale)


class Int8Embedding(Float32Buffers):
    """A table of V words; also the output projection of a model that ties both.

    Attributes:
        weight: (V, D) int8.
        weight_scale: (V,) float32.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, n_words: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_words, width, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.zeros(n_words))

    def forward(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., D) float32."""
        return self.weight[ids].float() * self.weight_scale[ids].unsqueeze(-1)


class Int8MoE(MoE):
    """A mixture of experts in int8. The router stays float32: its choices flip easily.

    Attributes:
        w_in: (E, 2F, D) int8, or (E, F, D) for ``gelu``.
        w_in_scale: (E, 2F) or (E, F) float32.
        w_out: (E, D, F) int8.
        w_out_scale: (E, D) float32.
    """

    w_in_scale: Tensor
    w_out_scale: Tensor

    def __init__(self, like: MoE) -> None:
        """Zeros, in the shape of another mixture."""
        nn.Module.__init__(self)
        self.top_k, self.activation = like.top_k, like.activation
        self.dispatcher = Int8Dispatcher(self)
        self.router = nn.Parameter(torch.zeros(like.router.shape), requires_grad=False)
        for name in ("w_in", "w_out"):
            shape = getattr(like, name).shape
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int8))
            self.register_buffer(name + SCALE, torch.zeros(shape[:2]))
        self.shared = like.shared
        bias = like.router_bias
        self.register_buffer("router_bias", None if bias is None else torch.zeros(bias.shape))


class Int8Dispatcher:
    """Runs the experts of one layer, whose scales it looks up there."""

    def __init__(self, layer: Int8MoE) -> None:
        self.layer = layer

    def __call__(
        self,
        x_ND: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        weights_NA: Tensor,
        experts_NA: Tensor,
        activation: str,
    ) -> Tensor:
        """(N, D) to (N, D): each expert's tokens through its two matrices, weighted and added."""
        w_in_scale, w_out_scale = self.layer.w_in_scale, self.layer.w_out_scale
        gated = activation == "swiglu"
        if 0 < experts_NA.numel() <= FEW_ROWS:
            return self._few(x_ND, w_in, w_out, weights_NA, experts_NA, gated)
        y_ND = torch.zeros_like(x_ND)
        for expert in experts_NA.unique().tolist():
            token_R, choice_R = (experts_NA == expert).nonzero(as_tuple=True)
            pre = int8_linear(x_ND[token_R], w_in[expert], w_in_scale[expert])
            hidden = activate(pre, gated)
            y_RD = int8_linear(hidden, w_out[expert], w_out_scale[expert])
            weight_R1 = weights_NA[token_R, choice_R].unsqueeze(1)
            y_ND.index_add_(0, token_R, (weight_R1 * y_RD).to(y_ND.dtype))
        return y_ND

    def _few(
        self,
        x_ND: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        weights_NA: Tensor,
        experts_NA: Tensor,
        gated: bool,
    ) -> Tensor:
        """Row by row, each with a copy of its expert: the device is not asked which those are."""
        top_k = experts_NA.shape[1]
        expert_R = experts_NA.reshape(-1).long()
        in_RFD, in_scale_RF = w_in[expert_R], self.layer.w_in_scale[expert_R]
        out_RDF, out_scale_RD = w_out[expert_R], self.layer.w_out_scale[expert_R]
        rows = []
        for row in range(len(expert_R)):
            x_1D = x_ND[row // top_k].unsqueeze(0)
            hidden_1F = activate(int8_linear(x_1D, in_RFD[row], in_scale_RF[row]), gated)
            rows.append(int8_linear(hidden_1F, out_RDF[row], out_scale_RD[row]))
        y_NAD = torch.cat(rows).unflatten(0, (-1, top_k))
        return (weights_NA.unsqueeze(-1) * y_NAD).sum(1).to(x_ND.dtype)


def make_int8(module: nn.Module) -> None:
    """Replace every matrix below a module by int8 zeros of the same shape, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child.in_features, child.out_features))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, Int8Embedding(child.num_embeddings, child.embedding_dim))
        elif isinstance(child, MoE):
            make_int8(child)  # the shared experts
            setattr(module, name, Int8MoE(child))
        else:
            make_int8(child)
