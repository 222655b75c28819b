"""The contiguous key-value cache: what generation keeps so that each token is computed once."""

from math import prod

import torch
from torch import Tensor

from pyllm._checks import check_size
from pyllm._memory import check_memory
from pyllm.layers._checks import check_sizes


class KVCache:
    """Keys and values of every layer for up to ``max_length`` positions.

    Memory: ``2 * n_layers * batch * max_length * n_kv_heads * head_dim`` numbers.

    Args:
        n_layers, batch, max_length, n_kv_heads, head_dim: sizes.
        dtype, device: of the stored keys and values.

    Raises:
        ValueError: a size below 1, more than the machine's memory.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        max_length: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_sizes(
            "kv cache",
            n_layers=n_layers,
            batch=batch,
            max_length=max_length,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
        )
        shape = (n_layers, 2, batch, max_length, n_kv_heads, head_dim)
        if torch.device(device).type == "cpu":
            check_memory(
                f"a kv cache of {max_length:,} positions for {batch:,} sequences",
                prod(map(int, shape)) * dtype.itemsize,
                "make it shorter or the batch smaller",
            )
        self._store_L2BSGK = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        """Positions filled in every layer."""

    @property
    def max_length(self) -> int:
        """Positions there is room for."""
        return self._store_L2BSGK.shape[3]

    def append(self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write T new positions of one layer; return all keys and values so far, (B, S, G, K).

        ``advance`` moves on to the next positions once every layer has written.

        Raises:
            ValueError: no room for T more positions, keys or values of another shape, or ones
                that want a gradient, which would stop at the cache.
        """
        if torch.is_grad_enabled() and (k_BTGK.requires_grad or v_BTGK.requires_grad):
            raise ValueError(
                "kv cache: gradients do not flow through it; use it under torch.inference_mode()"
            )
        n_layers, _, batch, _, n_kv_heads, head_dim = self._store_L2BSGK.shape
        if not 0 <= layer < n_layers:
            raise ValueError(f"kv cache: layer must be from 0 to {n_layers - 1}, got {layer}")
        # One sequence would be written into every row of a larger batch.
        shape = (batch, k_BTGK.shape[1] if k_BTGK.dim() > 1 else "T", n_kv_heads, head_dim)
        if tuple(k_BTGK.shape) != shape or tuple(v_BTGK.shape) != shape:
            raise ValueError(
                f"kv cache: keys and values must have shape ({batch}, T, {n_kv_heads}, "
                f"{head_dim}), got {tuple(k_BTGK.shape)} and {tuple(v_BTGK.shape)}; make a cache "
                "for this batch and this model"
            )
        end = self.length + k_BTGK.shape[1]
        if end > self.max_length:
            raise ValueError(
                f"kv cache: {end} positions do not fit into {self.max_length}; "
                "generate fewer tokens or make a larger cache"
            )
        keys_BSGK, values_BSGK = self._store_L2BSGK[layer]
        keys_BSGK[:, self.length : end] = k_BTGK
        values_BSGK[:, self.length : end] = v_BTGK
        return keys_BSGK[:, :end], values_BSGK[:, :end]

    def advance(self, n_tokens: int) -> None:
        """Call once per step, after the last layer.

        Raises:
            ValueError: a negative number, or more than there is room for.
        """
        check_size("kv cache: the tokens to advance by", n_tokens, 0, self.max_length - self.length)
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on.

        Raises:
            ValueError: it is negative, or more than there is.
        """
        self.length = check_size("kv cache: the length to truncate to", length, 0, self.length)
