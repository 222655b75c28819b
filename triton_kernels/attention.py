r"""Attention in Triton: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with windows and sinks.

Forward: one program for each block of queries of a head walks over the keys with an online softmax
in base 2 and keeps the log-sum-exp. Backward: one kernel for dQ, which walks over keys; one for dK
and dV, in which the program of a block of keys walks over the queries of all heads that share the
kv head, so that nothing is added across programs: no atomics, the same bits every time. Both take
:math:`\Delta = \mathrm{rowsum}(dY \odot Y)` from a small kernel before them. Blocks outside the
causal triangle and outside the window are never touched; only blocks on an edge pay for a mask.

float16, bfloat16 and float32 (by exact products, no TF32) with heads of at most 256 channels; what
else comes is another face's, see ``unserved``.

Not proven without a GPU: that the fastest configuration is among those listed, and that anything is
fast at all; the hardware's exp2 and log2, which are approximations; the tuner itself and the
choice by a card's shared memory. Interpreted and cross-compiled are the numbers and the blocks
visited, spills, shared memory and tensor-core instructions.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from pyllm.triton_kernels._attention_blocks import (
    edge_block,
    key_blocks,
    load_rows,
    narrowed,
    sees,
    store_rows,
)
from pyllm.triton_kernels._attention_choices import Choice, choices
from pyllm.triton_kernels._attention_gradients import delta_kernel, dk_dv_kernel, dq_kernel
from pyllm.triton_kernels._tuning import (
    INTERPRETED,
    Kernel,
    launch,
    on_its_card,
    shared_memory,
)
from pyllm.triton_kernels._variants import Variant
from torch import Tensor

WIDEST_HEAD = 256
LARGEST_STRIDE = 2**23
"""Offsets within a tile of at most 128 rows are 32 bits wide."""
MOST_POSITIONS = 2**29
LARGEST_SCALE = 1e30
DELTA_ROWS = 64
WHOLE_BLOCKS = 128
"""Queries; every block of them is a divisor of it."""
WORTH_TIMING = 2**24
"""Pairs of a query and a key, over all heads, from which the choices are timed: about 0.1 ms."""

INTERPRETED_BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 16}
"""So small that the few tokens of a test fill several."""


@triton.jit
def _attend(
    y,
    largest,  # of each row so far, in base 2
    total,
    q,
    k_ptr,
    v_ptr,
    first_key,
    positions,
    k_stride_s,
    v_stride_s,
    scale,
    n_keys,
    width,
    ahead,
    window,
    sinks,
    EDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of keys into the running softmax of a block of queries."""
    NARROW: tl.constexpr = v_ptr.dtype.element_ty
    k = load_rows(
        k_ptr, first_key, n_keys, k_stride_s, width, BLOCK_N, BLOCK_K, WHOLE_K, EDGE, UPCAST
    )
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    factor = scale
    if EDGE:
        keys = first_key + tl.arange(0, BLOCK_N)
        seen = sees(positions[:, None], keys[None, :], n_keys, ahead, window, sinks)
        s = tl.where(seen, s * scale, float("-inf"))
        factor = 1.0  # scaled before the mask, since 0 times -inf is NaN
    new = tl.maximum(largest, tl.max(s, axis=1) * factor)
    # Where a row has seen nothing yet, -inf less -inf would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s * factor - base[:, None])
    shrink = tl.exp2(largest - base)
    v = load_rows(
        v_ptr, first_key, n_keys, v_stride_s, width, BLOCK_N, BLOCK_K, WHOLE_K, EDGE, UPCAST
    )
    p_narrow = narrowed(p, NARROW, UPCAST)
    y = tl.dot(p_narrow, v, y * shrink[:, None], input_precision="ieee")
    return y, new, total * shrink + tl.sum(p, axis=1)


@Kernel
def forward_kernel(
    q_ptr,  # (B, T, H, K) with adjacent channels
    k_ptr,  # (B, S, G, K) with adjacent channels
    v_ptr,
    y_ptr,  # (B, T, H, K) contiguous
    lse_ptr,  # (B, H, T) float32
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    scale,  # not negative, times log2(e)
    n_queries,
    n_keys,
    n_heads,
    share,  # query heads to a kv head
    width,
    ahead,
    window,
    sinks,
    situation,  # for the tuner alone
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    blocks = tl.cdiv(n_queries, BLOCK_M)
    row_of_heads = tl.program_id(0) // blocks
    # The last queries of a causal call see most keys: they start first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    batch = tl.cast(row_of_heads // n_heads, tl.int64)
    head = tl.cast(row_of_heads % n_heads, tl.int64)
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + (head // share) * k_stride_g
    v_ptr += batch * v_stride_b + (head // share) * v_stride_g

    q = load_rows(
        q_ptr, first, n_queries, q_stride_t, width, BLOCK_M, BLOCK_K, WHOLE_K, True, UPCAST
    )
    positions = first + n_keys - n_queries + tl.arange(0, BLOCK_M)
    sunk, start, full_start, full_stop, stop = key_blocks(
        first, n_queries, n_keys, ahead, window, sinks, BLOCK_M, BLOCK_N
    )
    y = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for block in range(full_start, full_stop):
        y, largest, total = _attend(
            y,
            largest,
            total,
            q,
            k_ptr,
            v_ptr,
            block * BLOCK_N,
            positions,
            k_stride_s,
            v_stride_s,
            scale,
            n_keys,
            width,
            ahead,
            window,
            sinks,
            False,
            BLOCK_N,
            BLOCK_K,
            WHOLE_K,
            UPCAST,
        )
    for i in range(sunk + full_start - start + stop - full_stop):
        y, largest, total = _attend(
            y,
            largest,
            total,
            q,
            k_ptr,
            v_ptr,
            edge_block(i, sunk, start, full_start, full_stop) * BLOCK_N,
            positions,
            k_stride_s,
            v_stride_s,
            scale,
            n_keys,
            width,
            ahead,
            window,
            sinks,
            True,
            BLOCK_N,
            BLOCK_K,
            WHOLE_K,
            UPCAST,
        )

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    y = y / total[:, None]
    y_ptr += (batch * n_queries * n_heads + head) * width
    store_rows(y_ptr, y, first, n_queries, n_heads * width, width, BLOCK_M, BLOCK_K)
    lse = (largest + tl.log2(total)) * 0.6931471805599453
    lse = tl.where(nothing, float("-inf"), lse)
    rows = first + tl.arange(0, BLOCK_M)
    lse_ptr += tl.cast(row_of_heads, tl.int64) * n_queries
    tl.store(lse_ptr + rows, lse, mask=rows < n_queries)


def unserved(stage: str, *arguments: Any) -> str | None:
    """Why a call is not served: by its dtype, its heads, or sizes beyond the kernels' integers."""
    q, k = arguments[:2] if stage == "forward" else arguments[1:3]
    scale = arguments[3 if stage == "forward" else 6]
    n_heads, width = q.shape[2:]
    positions = q.shape[1] + k.shape[1]
    if q.dtype == torch.float64:
        return "no float64"
    if not 0 < width <= WIDEST_HEAD:
        return f"heads of {width} channels, not 1 to {WIDEST_HEAD}"
    if n_heads * width >= LARGEST_STRIDE:
        return f"{n_heads} heads of {width} channels, {LARGEST_STRIDE} numbers or more"
    if positions > MOST_POSITIONS:
        return f"{positions} positions, more than {MOST_POSITIONS}"
    if abs(scale) > LARGEST_SCALE:
        return f"a scale of {scale:g}, beyond {LARGEST_SCALE:g}"
    return None


def _adjacent(x: Tensor) -> Tensor:
    """With adjacent channels, and rows near enough for offsets of 32 bits within a tile."""
    return x if x.stride(3) == 1 and x.stride(1) < LARGEST_STRIDE else x.contiguous()


def _sight(q: Tensor, k: Tensor, causal: bool, window: int, sinks: int) -> dict[str, int]:
    """The kernels' ``ahead``, ``window`` and ``sinks``; see ``_attention_blocks``."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    windowed = 0 < window < n_keys
    return {
        "ahead": 0 if causal else n_queries,
        "window": window if windowed else n_keys,
        "sinks": min(sinks, n_keys) if windowed else 0,
        # The tuner tells apart three lengths, with and without a window.
        "situation": 2 * sum(n_keys > length for length in (1024, 4096)) + windowed,
    }


def _sizes(q: Tensor) -> dict[str, Any]:
    width = q.shape[3]
    block = max(triton.next_power_of_2(width), 16)
    return {"width": width, "BLOCK_K": block, "WHOLE_K": block == width}


def _strides(**tensors: Tensor) -> dict[str, int]:
    """``q_stride_b`` and so on, of all dimensions but the channels; 0 where there is one place,
    which then is aligned, wherever the next one would be."""
    return {
        f"{name}_stride_{dimension}": stride if size > 1 else 0
        for name, tensor in tensors.items()
        for dimension, stride, size in zip(
            "bsg" if name in "kv" else "bth", tensor.stride(), tensor.shape, strict=False
        )
    }


@cache
def _fitting(name: str, block_k: int, whole: bool, wide: bool, device: int) -> tuple[Choice, ...]:
    """The choices of a kernel that fit the card."""
    found = choices(name, block_k, whole, wide)
    return tuple(one for one in found if one.shared <= shared_memory(device))


def _launch(kernel: Kernel, rows: int, by: str, heads: int, arguments: dict[str, Any]) -> None:
    """A program for each block of ``rows`` of each of ``heads``; ``by`` names the block's size.

    They lie along the first dimension of the grid, which alone may pass 65,535.
    """
    q, block_k, whole = arguments["q_ptr"], arguments["BLOCK_K"], arguments["WHOLE_K"]

    def grid(blocks: dict[str, Any]) -> tuple[int]:
        return (heads * triton.cdiv(rows, blocks[by]),)

    if INTERPRETED:
        upcast = q.dtype == torch.bfloat16
        kernel.start(grid, **arguments, **INTERPRETED_BLOCKS, UPCAST=upcast)
        return
    found = _fitting(kernel.name, block_k, whole, q.dtype == torch.float32, q.device.index)
    pairs = arguments["n_queries"] * arguments["n_keys"] * q.shape[0] * q.shape[2]
    key = ("situation", "BLOCK_K")
    launch(kernel, found, grid, key, pairs >= WORTH_TIMING, **arguments, UPCAST=False)


@on_its_card
def attention_forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.attention.attention_forward`."""
    batch, n_queries, n_heads, _ = q_BTHK.shape
    y_BTHK = torch.empty_like(q_BTHK, memory_format=torch.contiguous_format)
    lse_BHT = q_BTHK.new_empty((batch, n_heads, n_queries), dtype=torch.float32)
    if y_BTHK.numel() == 0 or k_BSGK.numel() == 0:
        return y_BTHK.zero_(), lse_BHT.fill_(float("-inf"))
    # The largest score times a negative scale would be the smallest.
    q = _adjacent(-q_BTHK if scale < 0 else q_BTHK)
    k, v = _adjacent(k_BSGK), _adjacent(v_BSGK)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "y_ptr": y_BTHK,
        "lse_ptr": lse_BHT,
        "scale": abs(scale) / math.log(2),
        "n_queries": n_queries,
        "n_keys": k.shape[1],
        "n_heads": n_heads,
        "share": n_heads // k.shape[2],
        **_strides(q=q, k=k, v=v),
        **_sizes(q),
        **_sight(q, k, causal, window, sinks),
    }
    _launch(forward_kernel, n_queries, "BLOCK_M", batch * n_heads, arguments)
    return y_BTHK, lse_BHT


@on_its_card
def attention_backward(
    dy_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    y_BTHK: Tensor,
    lse_BHT: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.attention.attention_backward`."""
    dq_BTHK, dk_BSGK, dv_BSGK = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BTHK, k_BSGK, v_BSGK)
    )
    if q_BTHK.numel() == 0 or k_BSGK.numel() == 0:
        return dq_BTHK.zero_(), dk_BSGK.zero_(), dv_BSGK.zero_()
    (batch, n_queries, n_heads, _), (n_keys, n_groups) = q_BTHK.shape, k_BSGK.shape[1:3]
    dy, q = _adjacent(dy_BTHK.to(q_BTHK.dtype)), _adjacent(q_BTHK)
    k, v, y = _adjacent(k_BSGK), _adjacent(v_BSGK), _adjacent(y_BTHK)
    lse_BHT = lse_BHT.contiguous()
    rows = triton.cdiv(n_queries, WHOLE_BLOCKS) * WHOLE_BLOCKS
    delta_BHR, base_BHR = lse_BHT.new_empty(2, batch, n_heads, rows).unbind()
    arguments = {
        "dy_ptr": dy,
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "delta_ptr": delta_BHR,
        "base_ptr": base_BHR,
        "scale": scale,
        "scale_2": scale / math.log(2),
        "n_queries": n_queries,
        "n_keys": n_keys,
        "share": n_heads // n_groups,
        **_strides(dy=dy, q=q, k=k, v=v),
        "delta_stride_h": rows,
        **_sizes(q),
        **_sight(q, k, causal, window, sinks),
    }
    delta_kernel.start(
        (batch * n_heads * (rows // DELTA_ROWS),),
        dy_ptr=dy,
        y_ptr=y,
        lse_ptr=lse_BHT,
        delta_ptr=delta_BHR,
        base_ptr=base_BHR,
        **_strides(dy=dy, y=y),
        delta_stride_h=rows,
        scale=scale,
        n_queries=n_queries,
        n_heads=n_heads,
        **_sizes(q),
        BLOCK_M=DELTA_ROWS,
    )
    to_dq = {**arguments, "dq_ptr": dq_BTHK, "n_heads": n_heads}
    _launch(dq_kernel, n_queries, "BLOCK_M", batch * n_heads, to_dq)
    to_dk_dv = {**arguments, "dk_ptr": dk_BSGK, "dv_ptr": dv_BSGK, "n_groups": n_groups}
    _launch(dk_dv_kernel, n_keys, "BLOCK_N", batch * n_groups, to_dk_dv)
    return dq_BTHK, dk_BSGK, dv_BSGK


def variants(dtype: str) -> Iterator[Variant]:
    """Every choice of the tuner at usual heads, and one at a width that fills no tile."""
    kernels = (forward_kernel, dq_kernel, dk_dv_kernel)
    for width in (32, 64, 80, 128, 200, 256):  # 80 and 200 for all that fill no tile
        block_k = triton.next_power_of_2(width)
        fixed = {"BLOCK_K": block_k, "WHOLE_K": block_k == width}
        for kernel in kernels:
            for one in choices(kernel.name, block_k, block_k == width, dtype == "fp32"):
                yield _variant(kernel, dtype, one, {**fixed, **one.constants, "UPCAST": False})
        yield _variant(delta_kernel, dtype, Choice(64, 0, 4, 3), {**fixed, "BLOCK_M": DELTA_ROWS})


def _variant(kernel: Kernel, dtype: str, choice: Choice, constants: dict[str, Any]) -> Variant:
    def argument_type(name: str) -> str:
        if name in ("lse_ptr", "delta_ptr", "base_ptr"):
            return "*fp32"
        if name.endswith("_ptr"):
            return f"*{dtype}"
        return "fp32" if name.startswith("scale") else "i32"

    names = [name for name in kernel.arg_names if name not in constants]
    return Variant(
        "-".join([kernel.name, *(str(value) for value in constants.values())]),
        kernel,
        {name: argument_type(name) for name in names},
        constants,
        num_warps=choice.warps,
        num_stages=choice.stages,
        mma=dtype != "fp32" and kernel is not delta_kernel,
        shared=choice.shared,
    )
