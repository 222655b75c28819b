"""Checks that every export makes."""

from pathlib import Path

import torch
from torch import Tensor

from pyllm.layers import MoE
from pyllm.models import Int8Transformer, Transformer


def check_free(place: Path) -> None:
    """Nothing that a user has is replaced.

    Raises:
        ValueError: something is there.
    """
    if place.exists():
        raise ValueError(f"{place}: already there; remove it or name another place")


def check_exportable(model: Transformer) -> None:
    """Weights that other programs can hold, and a router that chooses as theirs do.

    Raises:
        ValueError: the weights are int8, or the router has a bias that is not zero (one of zeros
            changes no choice).
    """
    if isinstance(model, Int8Transformer):
        raise ValueError(
            "the model's weights are int8, a form of pyllm's own; export the model that it was "
            "made from (--to gguf --dtype q8_0 has 8 bits, too)"
        )
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
