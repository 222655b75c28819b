"""The contiguous key-value cache: what generation keeps so that each token is computed once."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for up to ``max_length`` positions.

    Memory: ``2 * n_layers * batch * max_length * n_kv_heads * head_dim`` numbers.

    Args:
        n_layers, batch, max_length, n_kv_heads, head_dim: sizes.
        dtype, device: of the stored keys and values.
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
        shape = (n_layers, 2, batch, max_length, n_kv_heads, head_dim)
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
            ValueError: no room for T more positions.
        """
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
        """Call once per step, after the last layer."""
        self.length += n_tokens

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"kv cache: cannot truncate {self.length} positions to {length}")
        self.length = length
