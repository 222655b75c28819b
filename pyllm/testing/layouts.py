"""The same values in hostile memory layouts."""

from collections.abc import Callable

import torch
from torch import Tensor


def strided(tensor: Tensor) -> Tensor:
    """Every second element of a buffer twice as wide, the rest NaN (or the largest integer)."""
    if tensor.dim() == 0:
        return tensor
    fill = float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    wide = torch.full((*tensor.shape, 2), fill, dtype=tensor.dtype, device=tensor.device)
    wide[..., 0] = tensor
    return wide[..., 0]


def offset(tensor: Tensor) -> Tensor:
    """Contiguous, but three elements into its storage: unaligned for vector loads."""
    storage = torch.empty(tensor.numel() + 3, dtype=tensor.dtype, device=tensor.device)
    view = storage[3:].view(tensor.shape)
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    """The last two dimensions swapped in memory."""
    if tensor.dim() < 2:
        return tensor
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def cut(tensor: Tensor) -> Tensor:
    """The first columns of rows that are wider, the rest NaN (or the largest integer)."""
    if tensor.dim() == 0:
        return tensor
    fill = float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
    wide = torch.full(
        (*tensor.shape[:-1], tensor.shape[-1] + 3), fill, dtype=tensor.dtype, device=tensor.device
    )
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def wide_indices(tensor: Tensor) -> Tensor:
    """Indices as int64, PyTorch's own kind, where the declaration has int32."""
    return tensor.long() if tensor.dtype == torch.int32 else tensor


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided,
    "offset": offset,
    "transposed": transposed,
    "cut": cut,
    "wide_indices": wide_indices,
}
