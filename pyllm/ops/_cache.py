"""Checks that the doors of a kv cache share: its shape, where new tokens stand, what is written."""

import torch
from torch import Tensor

from pyllm.cpu_kernels._cache import require_positions
from pyllm.ops._checks import (
    check_dense,
    check_flag,
    check_floating,
    check_integer,
    check_same_dtype,
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
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    sinks: int,
    rolling: bool,
) -> int:
    """Two caches of one shape, a start and a count for each row, and a ring behind the sinks.

    Both caches are floating point, or both int8 with scales.

    Returns:
        ``sinks`` as an int.
    """
    quantized = isinstance(k_cache, Tensor) and k_cache.dtype == torch.int8
    if quantized:
        check_dense(op, "k_cache", k_cache)
        check_dense(op, "v_cache", v_cache)
        check_same_dtype(op, k_cache=k_cache, v_cache=v_cache)
    else:
        check_floating(op, k_cache=k_cache, v_cache=v_cache)
    check_integer(op, starts=starts, counts=counts)
    check_shape(op, "k_cache", k_cache, ("B", "slots", "G", "K"))
    check_shape(op, "v_cache", v_cache, tuple(k_cache.shape))
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        _check_scales(op, name, scales, k_cache, quantized)
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


def _check_scales(
    op: str, name: str, scales: Tensor | None, cache: Tensor, quantized: bool
) -> None:
    """An int8 cache has them, float32, for each position and head; another one has none."""
    if not quantized:
        if scales is not None:
            raise ValueError(
                f"{op}: {name} are for an int8 cache, got them with one of {cache.dtype}"
            )
        return
    if scales is None:
        raise ValueError(f"{op}: an int8 cache needs {name}, got None")
    check_dense(op, name, scales)
    if scales.dtype != torch.float32:
        raise ValueError(f"{op}: {name} must be float32, got {scales.dtype}")
    check_shape(op, name, scales, tuple(cache.shape[:3]))


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
