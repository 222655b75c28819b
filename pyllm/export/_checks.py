"""Checks that every export makes."""

from pathlib import Path

import torch
from torch import Tensor

from pyllm.layers import MoE
from pyllm.models import Transformer


def check_free(place: Path) -> None:
    """Nothing that a user has is replaced.

    Raises:
        ValueError: something is there.
    """
    if place.exists():
        raise ValueError(f"{place}: already there; remove it or name another place")


def check_router_bias(model: Transformer) -> None:
    """A bias of zeros changes no choice, any other does.

    Raises:
        ValueError: the model has one that is not zero.
    """
    for layer, block in enumerate(model.blocks):
        bias = block.ffn.router_bias if isinstance(block.ffn, MoE) else None
        if bias is not None and bias.count_nonzero():
            raise ValueError(
                f"the model's router in layer {layer} has a bias that is not zero, and Mixtral's "
                "has none; it cannot be exported"
            )


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor on the CPU in another dtype.

    Raises:
        ValueError: a number is beyond the dtype's range (65,504 in float16), or is none.
    """
    result = tensor.detach().to(device="cpu", dtype=dtype)
    if not result.isfinite().all():
        reason = "beyond its range" if tensor.isfinite().all() else "NaN or infinite"
        raise ValueError(
            f"{name} cannot be written as {str(dtype).removeprefix('torch.')}: a number is {reason}"
        )
    return result
