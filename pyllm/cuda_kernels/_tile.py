"""The size of a block's product, which ``csrc/cuda/tile.cuh`` decides."""

import torch


def tile_rows(dtype: torch.dtype) -> int:
    """Rows of a tile."""
    return 32 if dtype == torch.float64 else 64


def tile_columns(dtype: torch.dtype) -> int:
    """Columns of a tile."""
    return 128 if dtype.itemsize == 2 else 64
