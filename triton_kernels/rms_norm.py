"""RMSNorm in Triton: one program per row forward, one per block of rows backward.

A row is held in registers whole, so each pass reads its tensors once. The arithmetic is float32
(float64 for float64 input), whatever the storage. The gradient of the weight is summed over a block
of rows by the block's program and over the blocks afterwards, always in the same order: no atomics,
so a run gives the same bits every time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from pyllm.triton_kernels._tuning import Kernel, on_its_card
from pyllm.triton_kernels._variants import Variant
from torch import Tensor

LONGEST_ROW = 16384
"""Above this a row no longer fits the registers of one forward program."""
WHOLE_ROW = 4096
"""Above this the backward would spill: 2.4 kB a thread at 16,384 columns on sm_80."""
MOST_BLOCKS, MOST_PARTIALS = 512, 2**20
"""At most so many partial sums of dweight, or four times as many of short rows: of those, a few
blocks keep too little of a multiprocessor's memory traffic in flight."""


@Kernel
def forward_kernel(
    x_ptr,  # (N, D) contiguous
    weight_ptr,  # (D,)
    y_ptr,  # (N, D)
    rstd_ptr,  # (N,) in the accumulation dtype
    width,
    eps: tl.float64,  # a Python number is else a float32, and no sum of float64 gets it back
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ACC)
    rstd = 1.0 / tl.sqrt((tl.sum(x * x, axis=0) / width + eps).to(ACC))
    tl.store(rstd_ptr + row, rstd)
    y = x * rstd * weight
    tl.store(y_ptr + row * width + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


@Kernel
def backward_kernel(
    dy_ptr,  # (N, D) contiguous
    x_ptr,  # (N, D) contiguous
    weight_ptr,  # (D,)
    rstd_ptr,  # (N,)
    dx_ptr,  # (N, D)
    partial_ptr,  # (blocks, D) in the accumulation dtype
    rows,
    width,
    rows_per_block,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    block = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ACC)
    dweight = tl.zeros([BLOCK_D], dtype=ACC)
    first = block * rows_per_block
    last = tl.minimum(first + rows_per_block, rows)
    for row in range(first, last):
        at = row * width + columns
        rstd = tl.load(rstd_ptr + row)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(ACC)
        x_hat = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC) * rstd
        g = dy * weight
        dx = rstd * (g - x_hat * (tl.sum(g * x_hat, axis=0) / width))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * x_hat
    tl.store(partial_ptr + block * width + columns, dweight, mask=inside)


@Kernel
def tiled_backward_kernel(
    dy_ptr,  # as in backward_kernel
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,  # zeros: each program adds to its own row
    rows,
    width,
    rows_per_block,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    block = tl.program_id(0).to(tl.int64)
    first = block * rows_per_block
    last = tl.minimum(first + rows_per_block, rows)
    for row in range(first, last):
        rstd = tl.load(rstd_ptr + row)
        sums = tl.zeros([BLOCK_D], dtype=ACC)
        for start in range(0, width, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < width
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ACC)
            dy = tl.load(dy_ptr + row * width + columns, mask=inside, other=0.0).to(ACC)
            x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(ACC)
            sums += dy * weight * (x * rstd)
        mean = tl.sum(sums, axis=0) / width
        # The second read of the row comes from the cache.
        for start in range(0, width, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            inside = columns < width
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ACC)
            dy = tl.load(dy_ptr + row * width + columns, mask=inside, other=0.0).to(ACC)
            x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(ACC)
            x_hat = x * rstd
            dx = rstd * (dy * weight - x_hat * mean)
            tl.store(dx_ptr + row * width + columns, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            partial_at = partial_ptr + block * width + columns
            dweight = tl.load(partial_at, mask=inside, other=0.0) + dy * x_hat
            tl.store(partial_at, dweight, mask=inside)


def launch_options(width: int) -> dict[str, int]:
    """Block size and warps for whole rows of ``width``: up to thirty-two elements a thread."""
    block = triton.next_power_of_2(max(width, 1))
    return {"BLOCK_D": block, "num_warps": min(max(block // 512, 1), 16)}


def backward_kernel_for(width: int) -> tuple[Any, dict[str, int]]:
    """The backward's kernel and its launch options.

    Row, weight and their part of dweight in registers up to ``WHOLE_ROW`` columns; a longer row
    is walked in tiles.
    """
    if width <= WHOLE_ROW:
        return backward_kernel, launch_options(width)
    return tiled_backward_kernel, {"BLOCK_D": 2048, "num_warps": 8}


def unserved(stage: str, *arguments: Any) -> str | None:
    """Why a call is not served: a row is longer than the registers of a program."""
    width = arguments[0].shape[-1]
    return None if width <= LONGEST_ROW else f"rows of {width} numbers, more than {LONGEST_ROW}"


@on_its_card
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.rms_norm.rms_norm_forward`."""
    width = x.shape[-1]
    double = x.dtype == torch.float64
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float64 if double else torch.float32)
    if rstd.numel() and width:
        forward_kernel.start(
            (rstd.numel(),),
            x_ptr=x,
            weight_ptr=weight,
            y_ptr=y,
            rstd_ptr=rstd,
            width=width,
            eps=eps,
            DOUBLE=double,
            **launch_options(width),
        )
    return y, rstd


@on_its_card
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.rms_norm.rms_norm_backward`."""
    width, rows = x.shape[-1], rstd.numel()
    dy, x, weight, rstd = dy.contiguous(), x.contiguous(), weight.contiguous(), rstd.contiguous()
    dx = torch.empty_like(x)
    if rows == 0 or width == 0:
        return dx, torch.zeros_like(weight)
    most = min(max(MOST_PARTIALS // width, MOST_BLOCKS), 4 * MOST_BLOCKS)
    rows_per_block = triton.cdiv(rows, most)
    blocks = triton.cdiv(rows, rows_per_block)
    partial = torch.zeros(blocks, width, dtype=rstd.dtype, device=x.device)
    kernel, options = backward_kernel_for(width)
    kernel.start(
        (blocks,),
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        rstd_ptr=rstd,
        dx_ptr=dx,
        partial_ptr=partial,
        rows=rows,
        width=width,
        rows_per_block=rows_per_block,
        DOUBLE=rstd.dtype == torch.float64,
        **options,
    )
    return dx, partial.sum(0).to(weight.dtype)


def variants(dtype: str) -> Iterator[Variant]:
    """Both kernels at a short, a usual, a long and the longest row."""
    pointer = f"*{dtype}"
    for width in (100, 2048, 2 * WHOLE_ROW, LONGEST_ROW):
        options = launch_options(width)
        yield Variant(
            f"forward-{width}",
            forward_kernel,
            {
                "x_ptr": pointer,
                "weight_ptr": pointer,
                "y_ptr": pointer,
                "rstd_ptr": "*fp32",
                "width": "i32",
                "eps": "fp64",
            },
            {"BLOCK_D": options["BLOCK_D"], "DOUBLE": False},
            num_warps=options["num_warps"],
        )
        kernel, options = backward_kernel_for(width)
        yield Variant(
            f"backward-{width}",
            kernel,
            {
                "dy_ptr": pointer,
                "x_ptr": pointer,
                "weight_ptr": pointer,
                "rstd_ptr": "*fp32",
                "dx_ptr": pointer,
                "partial_ptr": "*fp32",
                "rows": "i32",
                "width": "i32",
                "rows_per_block": "i32",
            },
            {"BLOCK_D": options["BLOCK_D"], "DOUBLE": False},
            num_warps=options["num_warps"],
        )
