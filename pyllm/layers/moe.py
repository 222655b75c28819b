"""The sparse mixture of experts as a layer: an fp32 router, stacked experts, a dispatcher."""

from contextlib import nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pyllm._checks import check_choice, check_size
from pyllm.layers._buffers import Float32Buffers
from pyllm.layers._checks import check_fits, check_input, check_sizes
from pyllm.layers.mlp import MLP
from pyllm.ops import moe_ffn, route_topk
from pyllm.ops.moe_ffn import ACTIVATIONS


class RouterStatistics(NamedTuple):
    """What one MoE layer reports of one batch."""

    balance_loss: Tensor
    """Scalar; 1 when the load is even (Switch Transformer, arXiv:2101.03961, eq. 4)."""
    z_loss: Tensor
    """Scalar (ST-MoE, arXiv:2202.08906, eq. 5)."""
    tokens_per_expert: Tensor
    """(E,) int32."""


class Dispatcher(Protocol):
    """Takes tokens to their experts and back. The layer is handed one, so that experts can live
    on other processes without the layer knowing."""

    def __call__(
        self,
        x_ND: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        weights_NA: Tensor,
        experts_NA: Tensor,
        activation: str,
    ) -> Tensor:
        """(N, D) to (N, D)."""
        ...


class LocalDispatcher:
    """All experts live in this process."""

    def __call__(
        self,
        x_ND: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        weights_NA: Tensor,
        experts_NA: Tensor,
        activation: str,
    ) -> Tensor:
        """See :func:`pyllm.ops.moe_ffn`."""
        return moe_ffn(x_ND, w_in, w_out, weights_NA, experts_NA, activation)


class MoE(Float32Buffers):
    """``n_experts`` feed-forward networks, of which ``top_k`` run for each token.

    ``sum_a w_a expert_a(x) + shared(x)``

    Args:
        width: D.
        hidden: F, of each expert.
        n_experts: E.
        top_k: experts per token.
        activation: ``swiglu`` or ``gelu``.
        dispatcher: where the experts live; by default in this process.
        n_shared: experts beside them that run for every token, as one network of ``n_shared * F``
            (DeepSeekMoE, arXiv:2401.06066, eq. 9 to 11, with the routed weights of Mixtral).
        router_bias: keep a bias on the choice of experts, see :meth:`move_bias`.

    Raises:
        ValueError: a size below 1, more experts per token than there are, an unknown activation.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        n_experts: int,
        top_k: int,
        activation: str,
        dispatcher: Dispatcher | None = None,
        n_shared: int = 0,
        router_bias: bool = False,
    ) -> None:
        super().__init__()
        width, hidden, n_experts, top_k = check_sizes(
            "MoE", width=width, hidden=hidden, n_experts=n_experts, top_k=top_k
        )
        check_choice("MoE: activation", activation, ACTIVATIONS)
        if top_k > n_experts:
            raise ValueError(f"MoE: top_k ({top_k}) must not exceed n_experts ({n_experts})")
        self.top_k = top_k
        self.activation = activation
        self.dispatcher = dispatcher or LocalDispatcher()
        columns = 2 * hidden if activation == "swiglu" else hidden
        what = f"MoE: {n_experts:,} experts of {hidden:,} by {width:,}"
        weights = n_experts * width * (1 + columns + hidden)
        check_fits(what, weights, 0, "make it narrower or with fewer experts")
        self.router = nn.Parameter(torch.empty(n_experts, width))
        self.w_in = nn.Parameter(torch.empty(n_experts, columns, width))
        self.w_out = nn.Parameter(torch.empty(n_experts, width, hidden))
        n_shared = check_size("MoE: n_shared", n_shared, 0)
        self.shared = MLP(width, n_shared * hidden, activation) if n_shared else None
        # Float32: the router works in it, and steps of 0.001 are lost in bf16.
        self.router_bias: Tensor | None
        bias_E = torch.zeros(n_experts, dtype=torch.float32) if router_bias else None
        self.register_buffer("router_bias", bias_E)

    @torch.no_grad()
    def move_bias(self, tokens_per_expert_E: Tensor, rate: float) -> None:
        """Balance without a loss (DeepSeek-V3, arXiv:2412.19437, sec. 2.1.2).

        The bias of an expert with more than its share of the tokens goes down by ``rate``, that of
        one with less goes up. Here it is added to the router's probabilities, there to sigmoids.

        Args:
            tokens_per_expert_E: (E,) how many choices fell on each.
            rate: of the order of 0.001.
        """
        assert self.router_bias is not None
        counts_E = tokens_per_expert_E.to(self.router_bias)
        self.router_bias += rate * (counts_E.mean() - counts_E).sign()

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, RouterStatistics]:
        """(B, T, D) to (B, T, D) and the router's statistics."""
        check_input("MoE", x_BTD, self.router.shape[1], dims=3)
        x_ND = x_BTD.flatten(0, 1)
        # The router works in fp32: bf16 logits make ties and flip choices (Switch, sec. 2.4).
        # The meta device has no autocast to turn off.
        device = x_ND.device.type
        available = torch.amp.is_autocast_available(device)
        with torch.autocast(device, enabled=False) if available else nullcontext():
            logits_NE = x_ND.float() @ self.router.float().t()
        routing = route_topk(logits_NE, self.top_k, bias=self.router_bias)
        y_ND = self.dispatcher(
            x_ND, self.w_in, self.w_out, routing.weights, routing.experts, self.activation
        )
        statistics = RouterStatistics(
            routing.balance_loss, routing.z_loss, routing.tokens_per_expert
        )
        y_BTD = y_ND.view_as(x_BTD)
        return (y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)), statistics
