"""A kv cache as a step sees it whose positions only the device knows."""

import torch
from torch import Tensor

from pyllm.layers.kv_cache import KVCache


class StepCache:
    """Where the next token of each row goes in a kv cache, as tensors beside it.

    For steps that run before the host knows what the last one drew, such as a captured one, which
    always reads the same addresses. The caller claims the positions
    (:meth:`pyllm.layers.KVCache.claim`) and advances the cache once it knows.

    Attributes:
        cache: whose keys and values are written and read.
        starts_B: (B,) int32, the position of each row's new token.
        counts_B: (B,) int32, 1 where the row gets one and 0 where it stands still.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.starts_B = torch.zeros(cache.batch, dtype=torch.int32, device=cache.store.device)
        self.counts_B = torch.zeros_like(self.starts_B)

    def append(self, layer: int, k_B1GK: Tensor, v_B1GK: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values; the starts and counts, as
        :meth:`pyllm.layers.KVCache.append` returns them."""
        self.cache.write(layer, k_B1GK, v_B1GK, self.starts_B, self.counts_B)
        return self.starts_B, self.counts_B
