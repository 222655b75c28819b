"""In which precision an operation does its arithmetic."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every narrower floating type is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
