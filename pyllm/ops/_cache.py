"""Checks that the doors of a kv cache share: its shape, where new tokens stand, what is written."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._cache import require_positions
from pyllm.ops._checks import (
    check_flag,
    check_floating,
    check_integer,
    check_shape,
    check_whole,
    is_readable,
)


def check_cache(
    op: str,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    counts: Tensor,
    sinks: int,
    rolling: bool,
) -> int:
    """Two caches of one shape, a start and a count for each row, and a ring behind the sinks.

    Returns:
        ``sinks`` as an int.
    """
    check_floating(op, k_cache=k_cache, v_cache=v_cache)
    check_integer(op, starts=starts, counts=counts)
    check_shape(op, "k_cache", k_cache, ("B", "slots", "G", "K"))
    check_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    batch, n_slots = k_cache.shape[:2]
    check_shape(op, "starts", starts, (batch,))
    check_shape(op, "counts", counts, (batch,))
    check_flag(op, "rolling", rolling)
    sinks = check_whole(op, "sinks", sinks, least=0)
    if rolling and sinks >= n_slots:
        raise ValueError(
            f"{op}: a rolling cache needs more slots than sinks, got {n_slots} slots and "
            f"{sinks} sinks"
        )
    return sinks


def check_positions(
    op: str, starts: Tensor, counts: Tensor, n_tokens: int, n_slots: int, rolling: bool
) -> None:
    """The new tokens fit into the cache. On the CPU only, see ``check_index_range``."""
    if is_readable(starts) and is_readable(counts):
        require_positions(op, starts, counts, n_tokens, n_slots, rolling)


def check_written(op: str, written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """What is written to is contiguous, and shares no memory with anything else."""
    for name, tensor in written.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} is written to and must be contiguous, got strides "
                f"{tensor.stride()} for shape {tuple(tensor.shape)}"
            )
    if torch.compiler.is_compiling():
        return
    extents = {n: _extent(t) for n, t in {**written, **read}.items() if _has_memory(t)}
    for name in written:
        begin, end = extents.get(name, (0, 0))
        for other, (other_begin, other_end) in extents.items():
            if other != name and begin < other_end and other_begin < end:
                raise ValueError(
                    f"{op}: {name} is written to and must share no memory with another input, got "
                    f"{other} in the same place; clone it"
                )


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not tensor.is_meta and tensor.numel() > 0


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses a tensor lies between; what lies between its elements counts as its own."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    last = 0
    for size, step in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * step
    return begin, begin + (last + 1) * tensor.itemsize
