"""Causal self-attention as a layer: projections, rotary positions, cache, attention."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyllm._checks import check_size
from pyllm.layers._checks import check_fits, check_input, check_sizes
from pyllm.layers.kv_cache import PIECE, KVCache
from pyllm.layers.step_cache import StepCache
from pyllm.ops import attention, decode_attention, rope


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
        cache: KVCache | StepCache | None = None,
        layer: int = 0,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D); with a cache, T new tokens see everything it holds.

        ``counts`` says how many of the T are real in each sequence of a cache, None for all.

        Raises:
            ValueError: a cache that does not fit.
        """
        check_input("CausalSelfAttention", x_BTD, self.width, dims=3)
        qkv_BTJK = self.qkv_proj(x_BTD).unflatten(-1, (sum(self.heads), self.head_dim))
        if rotary is None:
            q_BTHK, k_BTGK, v_BTGK = qkv_BTJK.split(self.heads, dim=2)
        else:
            # Queries and keys lie side by side and are turned in one call.
            n_turned = self.heads[0] + self.heads[1]
            qk_BTJK, v_BTGK = qkv_BTJK.split([n_turned, self.heads[2]], dim=2)
            q_BTHK, k_BTGK = rope(qk_BTJK, *rotary).split(self.heads[:2], dim=2)
        if cache is None:
            y_BTHK = attention(q_BTHK, k_BTGK, v_BTGK, window=self.window, sinks=self.sinks)
        elif isinstance(cache, StepCache):
            at = cache.append(layer, k_BTGK, v_BTGK)
            y_BTHK = self._look(q_BTHK, cache.cache, layer, at)
        else:
            y_BTHK = self._attend(q_BTHK, k_BTGK, v_BTGK, cache, layer, counts)
        return self.out_proj(y_BTHK.flatten(2))

    def _attend(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        cache: KVCache,
        layer: int,
        counts: Sequence[int] | None,
    ) -> Tensor:
        """Append the new keys and values, and let the new queries see what they may."""
        cache.check_window("layer", self.window, self.sinks)
        n_tokens = q_BTHK.shape[1]
        if cache.length == 0:
            # Nothing to look back to, and padding is on the right, where no real query sees it.
            cache.append(layer, k_BTGK, v_BTGK, counts)
            if cache.scales is not None:
                k_BTGK, v_BTGK = cache.as_held(k_BTGK), cache.as_held(v_BTGK)
            return attention(q_BTHK, k_BTGK, v_BTGK, window=self.window, sinks=self.sinks)
        if n_tokens > PIECE and counts is None and cache.is_even:
            # Matrix products pay for a long block, with all that it sees side by side. In a
            # contiguous cache it is so already, unless in int8; a rolling one is about to write
            # over some of it.
            quantized = cache.scales is not None
            see_old = cache.rolling or quantized
            seen = cache.look_back(layer, k_BTGK.dtype) if see_old else ()
            cache.append(layer, k_BTGK, v_BTGK)
            if seen:
                if quantized:
                    k_BTGK, v_BTGK = cache.as_held(k_BTGK), cache.as_held(v_BTGK)
                k_BSGK, v_BSGK = (
                    torch.cat([old, fresh], dim=1)
                    for old, fresh in zip(seen, (k_BTGK, v_BTGK), strict=True)
                )
            else:
                k_BSGK, v_BSGK = (x[:, : cache.length + n_tokens] for x in cache.slots(layer))
            return attention(q_BTHK, k_BSGK, v_BSGK, window=self.window, sinks=self.sinks)
        pieces = []
        for before in range(0, max(n_tokens, 1), PIECE):
            new = slice(before, before + PIECE)
            at = cache.append(layer, k_BTGK[:, new], v_BTGK[:, new], counts, before)
            pieces.append(self._look(q_BTHK[:, new], cache, layer, at))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _look(
        self, q_BTHK: Tensor, cache: KVCache, layer: int, at: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Let queries at these starts and counts see a cache that holds their own keys already."""
        k_scales_BSG, v_scales_BSG = cache.scales_of(layer)
        return decode_attention(
            q_BTHK,
            *cache.slots(layer),
            *at,
            window=self.window,
            sinks=self.sinks,
            rolling=cache.rolling,
            k_scales=k_scales_BSG,
            v_scales=v_scales_BSG,
        )
