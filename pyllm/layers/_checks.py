"""Checks that several layers make of what they are built from and given."""

from torch import Tensor

from pyllm._checks import check_size, shown

ACTIVATIONS = ("swiglu", "gelu")


def check_sizes(layer: str, **sizes: int) -> None:
    """Every size is a whole number of at least 1."""
    for name, size in sizes.items():
        check_size(f"{layer}: {name}", size, 1)


def check_activation(layer: str, activation: str) -> None:
    """It is one that the feed-forward layers know."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"{layer}: activation must be one of {', '.join(ACTIVATIONS)}, got {shown(activation)}"
        )


def check_input(layer: str, x: Tensor, width: int, dims: int | None = None) -> None:
    """``x`` is a floating-point tensor whose last size is ``width``, of ``dims`` sizes in all."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{layer}: x must be a floating-point tensor, got {given}")
    if x.dim() == 0 or x.shape[-1] != width or dims not in (None, x.dim()):
        wanted = f"(B, T, {width})" if dims == 3 else f"(..., {width})"
        raise ValueError(f"{layer}: x must have shape {wanted}, got {tuple(x.shape)}")
