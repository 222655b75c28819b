"""Causal self-attention as a layer: projections, rotary positions, cache, attention."""

from torch import Tensor, nn

from pyllm._checks import check_size
from pyllm.layers._checks import check_fits, check_input, check_sizes
from pyllm.layers.kv_cache import KVCache
from pyllm.ops import attention, rope


class CausalSelfAttention(nn.Module):
    """Multi-head attention with grouped key-value heads (arXiv:1706.03762, arXiv:2305.13245).

    Queries, keys and values come from one matrix: H query heads, then G key heads, then G value
    heads, each of K rows.

    Args:
        width: D.
        n_heads: H; K = D / H.
        n_kv_heads: G, a divisor of H.
        window: positions a query sees, its own included; None for all.
        sinks: first positions that stay in sight whatever the window.

    Raises:
        ValueError: a size below 1, sinks below 0, H that does not divide D, G that does not divide
            H.
    """

    def __init__(
        self,
        width: int,
        n_heads: int,
        n_kv_heads: int,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        super().__init__()
        width, n_heads, n_kv_heads = check_sizes(
            "CausalSelfAttention", width=width, n_heads=n_heads, n_kv_heads=n_kv_heads
        )
        if window is not None:
            check_sizes("CausalSelfAttention", window=window)
        check_size("CausalSelfAttention: sinks", sinks, 0)
        if width % n_heads or n_heads % n_kv_heads:
            raise ValueError(
                f"CausalSelfAttention: n_kv_heads ({n_kv_heads}) must divide n_heads ({n_heads}), "
                f"and n_heads the width ({width})"
            )
        self.width = width
        self.head_dim = width // n_heads
        self.heads = [n_heads, n_kv_heads, n_kv_heads]
        weights = width * self.head_dim * (sum(self.heads) + n_heads)
        check_fits(f"CausalSelfAttention: a width of {width:,}", weights, 0, "make it narrower")
        self.window = window
        self.sinks = sinks
        self.qkv_proj = nn.Linear(width, sum(self.heads) * self.head_dim, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, D) to (B, T, D); with a cache, T new tokens see everything it holds."""
        check_input("CausalSelfAttention", x_BTD, self.width, dims=3)
        qkv_BTJK = self.qkv_proj(x_BTD).unflatten(-1, (sum(self.heads), self.head_dim))
        if rotary is None:
            q_BTHK, k_BTGK, v_BTGK = qkv_BTJK.split(self.heads, dim=2)
        else:
            # Queries and keys lie side by side and are turned in one call.
            n_turned = self.heads[0] + self.heads[1]
            qk_BTJK, v_BTGK = qkv_BTJK.split([n_turned, self.heads[2]], dim=2)
            q_BTHK, k_BTGK = rope(qk_BTJK, *rotary).split(self.heads[:2], dim=2)
        if cache is not None:
            k_BTGK, v_BTGK = cache.append(layer, k_BTGK, v_BTGK)
        y_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, window=self.window, sinks=self.sinks)
        return self.out_proj(y_BTHK.flatten(2))
