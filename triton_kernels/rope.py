"""Rotary position embedding in Triton: one pass, each program a tile of tokens, heads and planes.

A tile holds both channels of each plane, so that each is read and written once. Rows may lie apart
(heads cut out of a wider projection need no copy); the result is contiguous. The arithmetic is
float32 (float64 for float64 input), whatever the storage.

Not proven without a GPU: its speed, for which only the bytes moved speak.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from pyllm.triton_kernels._tuning import Kernel, on_its_card
from pyllm.triton_kernels._variants import Variant
from torch import Tensor

WIDEST_TILE = 128
"""Planes."""
PLANES = 1024
"""In a tile: 8 a thread."""
LARGEST_STRIDE = 2**23
"""Offsets within a tile, of at most 256 tokens with 8 heads, are 32 bits wide."""
MOST_TOGETHER = 256


@Kernel
def turn_kernel(
    x_ptr,  # (B, T, H, 2 * half) with adjacent channels
    cos_ptr,  # (T, half), or (B, T, half) with table_stride_b = T * half; contiguous
    sin_ptr,
    y_ptr,  # (B, T, H, 2 * half) contiguous
    x_stride_b,
    x_stride_t,
    x_stride_h,
    table_stride_b,
    n_tokens,
    n_heads,
    half,
    INVERSE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,  # a divisor of n_heads
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    column_blocks = tl.cdiv(half, BLOCK)
    head_blocks = n_heads // HEADS
    token_blocks = tl.cdiv(n_tokens, TOKENS)
    place = tl.program_id(0)
    first_column = (place % column_blocks) * BLOCK
    place = place // column_blocks
    first_head = tl.cast((place % head_blocks) * HEADS, tl.int64)
    place = place // head_blocks
    first_token = tl.cast((place % token_blocks) * TOKENS, tl.int64)
    batch = tl.cast(place // token_blocks, tl.int64)

    row = tl.arange(0, TOKENS * HEADS)
    token, head = (row // HEADS)[:, None], (row % HEADS)[:, None]
    column = (first_column + tl.arange(0, BLOCK))[None, :]
    inside = (token < n_tokens - first_token) & (column < half)

    table_at = batch * table_stride_b + first_token * half + (token * half + column)
    cos = tl.load(cos_ptr + table_at, mask=inside, other=0.0).to(ACC)
    sin = tl.load(sin_ptr + table_at, mask=inside, other=0.0).to(ACC)
    if INVERSE:
        sin = -sin
    x_ptr += batch * x_stride_b + first_token * x_stride_t + first_head * x_stride_h
    x_at = x_ptr + (token * x_stride_t + head * x_stride_h + column)
    a = tl.load(x_at, mask=inside, other=0.0).to(ACC)
    b = tl.load(x_at + half, mask=inside, other=0.0).to(ACC)
    y_ptr += ((batch * n_tokens + first_token) * n_heads + first_head) * half * 2
    y_at = y_ptr + ((token * n_heads + head) * half * 2 + column)
    tl.store(y_at, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_at + half, (a * sin + b * cos).to(y_ptr.dtype.element_ty), mask=inside)


def tile(n_heads: int, half: int) -> dict[str, int]:
    """Tokens, heads and planes of a tile."""
    block = min(triton.next_power_of_2(half), WIDEST_TILE)
    heads = math.gcd(n_heads, 8)
    return {
        "TOKENS": max(min(PLANES // block, MOST_TOGETHER) // heads, 1),
        "HEADS": heads,
        "BLOCK": block,
    }


def unserved(stage: str, *arguments: Any) -> str | None:
    """Why a call is not served: no copy brings its tokens near enough for offsets of 32 bits."""
    n_heads, width = arguments[0].shape[2:]
    if n_heads * width < LARGEST_STRIDE:
        return None
    return f"{n_heads} heads of {width} channels, {LARGEST_STRIDE} numbers or more"


@on_its_card
def _turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    batch, n_tokens, n_heads, width = x_BTHK.shape
    half = width // 2
    y_BTHK = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    if y_BTHK.numel() == 0:
        return y_BTHK
    near = max(x_BTHK.stride(1), x_BTHK.stride(2), n_heads * width) < LARGEST_STRIDE
    x = x_BTHK if x_BTHK.stride(3) == 1 and near else x_BTHK.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    blocks = tile(n_heads, half)
    programs = (
        batch
        * triton.cdiv(n_tokens, blocks["TOKENS"])
        * (n_heads // blocks["HEADS"])
        * triton.cdiv(half, blocks["BLOCK"])
    )
    turn_kernel.start(
        (programs,),
        x_ptr=x,
        cos_ptr=cos,
        sin_ptr=sin,
        y_ptr=y_BTHK,
        x_stride_b=x.stride(0),
        x_stride_t=x.stride(1),
        x_stride_h=x.stride(2),
        table_stride_b=n_tokens * half if cos.dim() == 3 else 0,
        n_tokens=n_tokens,
        n_heads=n_heads,
        half=half,
        INVERSE=inverse,
        DOUBLE=x.dtype == torch.float64,
        **blocks,
    )
    return y_BTHK


def rope_forward(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`pyllm.reference.rope.rope_forward`."""
    return _turn(x_BTHK, cos, sin, inverse=False)


def rope_backward(dy_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See :func:`pyllm.reference.rope.rope_backward`."""
    return _turn(dy_BTHK, cos, sin, inverse=True)


def variants(dtype: str) -> Iterator[Variant]:
    """Usual heads, one of an odd number and width, the narrowest and the widest tile."""
    for n_heads, half in ((8, 32), (40, 64), (3, 40), (1, 1), (2, 512)):
        names = [name for name in turn_kernel.arg_names if not name.isupper()]
        types = {
            name: "*fp32" if name in ("cos_ptr", "sin_ptr") else f"*{dtype}" for name in names[:4]
        }
        yield Variant(
            f"turn-{n_heads}-{half}",
            turn_kernel,
            {**types, **dict.fromkeys(names[4:], "i32")},
            {"INVERSE": half == 32, "DOUBLE": False, **tile(n_heads, half)},
            aligned=half % 16 == 0,
        )
