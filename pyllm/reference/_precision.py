"""In which precision an operation does its arithmetic."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; every narrower floating type is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype to multiply where results can be large: float16 ends at 65,504."""
    return torch.float32 if dtype == torch.float16 else dtype


LARGEST_INT8_WIDTH = 2**31 // (128 * 127)
"""So many products of int8 add up to what int32 holds."""
