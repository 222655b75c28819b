"""The output projection and its loss in Triton; the logits are never whole in memory.

Forward: a program takes a block of rows through a span of words, block by block, with the largest
logit and the sum of exponentials kept in registers (online softmax); a second kernel adds the spans
of each row. Backward: a slab of words at a time, as many as ``slab_bytes`` hold for all rows. Its
logits are computed again and become their gradient, in the dtype of ``x``; from that follow the
slab's rows of ``dweight``, complete at once, and its share of ``dx``, which is added up in float32.
The upstream gradient is multiplied in afterwards, so that a mean over many rows does not push
float16 below its smallest number. Partial sums are added in a fixed order: no atomics.

Not run on a card yet: interpreted, and every configuration compiled for sm_80, 86, 89 and 90.
Whether spans of 1,024 words and slabs of a 64th of the memory are the best sizes, and which
configurations are the fastest, is not shown by that.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from pyllm.triton_kernels import _lce_kernels as kernels
from pyllm.triton_kernels._tuning import (
    INTERPRETED,
    WORTH_TIMING,
    Blocks,
    launch_product,
    on_its_card,
    row_shape,
)
from pyllm.triton_kernels._variants import ITEM_SIZES, Variant, products, variant
from torch import Tensor

from pyllm.reference import _loss_sizes as sizes

GROUP = 8
INTERPRETER_BLOCKS = Blocks(64, 128, 16, 4, 1)
"""Larger than others, or the tests' 5,003 words would be hundreds of programs."""
SPAN = 512 if INTERPRETED else sizes.SPAN
"""Words that one program of the forward goes through."""

# The sums over a block's words take registers: 128 x 128 spills on sm_86, or on sm_90.
SPANS = {
    2: (Blocks(128, 64, 64, 8, 3), Blocks(64, 128, 64, 4, 3)),
    4: (Blocks(64, 64, 16, 4, 2),),
    8: (Blocks(32, 32, 16, 4, 2),),
}
# Wider ones need what only sm_90 has of shared memory, see moe_ffn.
PRODUCTS = {
    2: (
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 128, 64, 8, 4),
        Blocks(128, 256, 64, 8, 4),
    ),
    4: (Blocks(64, 64, 16, 4, 2),),
    8: (Blocks(32, 32, 16, 4, 2),),
}
# Adds to what it reads, so it cannot be timed on real data: the first that fits is taken.
ROW_GRADIENT = {
    2: (Blocks(128, 128, 64, 8, 4), Blocks(128, 128, 64, 8, 3)),
    4: (Blocks(64, 64, 16, 4, 2),),
    8: (Blocks(32, 32, 16, 4, 2),),
}


@on_its_card
def linear_cross_entropy_forward(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.linear_cross_entropy.linear_cross_entropy_forward`."""
    x_ND, weight_VD = x_ND.contiguous(), weight_VD.contiguous()
    targets_N = targets_N.long().contiguous()
    (n_rows, width), n_words = x_ND.shape, weight_VD.shape[0]
    loss_N = torch.empty(n_rows, dtype=_wide(x_ND), device=x_ND.device)
    lse_N = torch.empty_like(loss_N)
    if n_rows == 0:
        return loss_N, lse_N
    n_spans = triton.cdiv(n_words, SPAN)
    maxima = loss_N.new_empty(n_spans, n_rows)
    sums = torch.empty_like(maxima)
    # A target that is no word finds no logit, and its loss is NaN.
    picked_N = torch.full_like(loss_N, float("nan"))
    launch_product(
        kernels.span_kernel,
        _choices(SPANS, x_ND),
        lambda c: (triton.cdiv(n_rows, c["BLOCK_M"]) * n_spans,),
        ("n_words", "width"),
        x_ND,
        n_rows * width * n_words >= WORTH_TIMING,
        x_ptr=x_ND,
        w_ptr=weight_VD,
        targets_ptr=targets_N,
        maximum_ptr=maxima,
        sum_ptr=sums,
        picked_ptr=picked_N,
        n_rows=n_rows,
        n_words=n_words,
        width=width,
        SPAN=SPAN,
        **_constants(x_ND),
    )
    kernels.loss_kernel.start(
        (triton.cdiv(n_rows, 128),),
        maximum_ptr=maxima,
        sum_ptr=sums,
        picked_ptr=picked_N,
        targets_ptr=targets_N,
        loss_ptr=loss_N,
        lse_ptr=lse_N,
        n_rows=n_rows,
        n_spans=n_spans,
        ignore_index=ignore_index,
        BLOCK=128,
        DOUBLE=x_ND.dtype == torch.float64,
    )
    return loss_N, lse_N


@on_its_card
def linear_cross_entropy_backward(
    dloss_N: Tensor,
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.linear_cross_entropy.linear_cross_entropy_backward`."""
    x_ND, weight_VD = x_ND.contiguous(), weight_VD.contiguous()
    targets_N, lse_N = targets_N.long().contiguous(), lse_N.contiguous()
    dloss_N = dloss_N.to(lse_N.dtype).contiguous()
    (n_rows, width), n_words = x_ND.shape, weight_VD.shape[0]
    dx_ND, dweight_VD = torch.empty_like(x_ND), torch.empty_like(weight_VD)
    if n_rows == 0:
        return dx_ND, dweight_VD.zero_()
    largest = dloss_N.where(targets_N != ignore_index, 0.0).abs().amax()
    largest = largest.where(largest != 0, 1.0)
    scaled_ND = torch.empty_like(x_ND)
    _scale(x_ND.unsqueeze(0), dloss_N, largest, targets_N, scaled_ND, ignore_index, relative=True)

    slab, splits = _cut(x_ND, n_words)
    # Whole blocks of the sum, so that no configuration cuts one in two.
    words_per_split = triton.cdiv(triton.cdiv(slab, splits), 64) * 64
    dz = x_ND.new_empty(n_rows, slab)
    sums = torch.zeros(splits, n_rows, width, dtype=lse_N.dtype, device=x_ND.device)
    common = {"n_rows": n_rows, "width": width, "stride": slab, "GROUP": GROUP, **_constants(x_ND)}
    for first in range(0, n_words, slab):
        words = weight_VD[first : first + slab]
        size = words.shape[0]
        worth_timing = n_rows * width * size >= WORTH_TIMING
        launch_product(
            kernels.logit_gradient_kernel,
            _choices(PRODUCTS, x_ND),
            lambda c, size=size: (_blocks(n_rows, c["BLOCK_M"], size, c["BLOCK_N"]),),
            ("width",),
            x_ND,
            worth_timing,
            x_ptr=x_ND,
            w_ptr=words,
            targets_ptr=targets_N,
            lse_ptr=lse_N,
            dz_ptr=dz,
            n_words=size,
            first_word=first,
            ignore_index=ignore_index,
            **common,
        )
        launch_product(
            kernels.row_gradient_kernel,
            _choices(ROW_GRADIENT, x_ND),
            lambda c: (_blocks(n_rows, c["BLOCK_M"], width, c["BLOCK_N"]), splits),
            (),
            x_ND,
            False,
            dz_ptr=dz,
            w_ptr=words,
            sum_ptr=sums,
            n_words=size,
            words_per_split=words_per_split,
            **common,
        )
        launch_product(
            kernels.word_gradient_kernel,
            _choices(PRODUCTS, x_ND),
            lambda c, size=size: (_blocks(size, c["BLOCK_M"], width, c["BLOCK_N"]),),
            ("width",),
            x_ND,
            worth_timing,
            dz_ptr=dz,
            x_ptr=scaled_ND,
            largest_ptr=largest,
            dw_ptr=dweight_VD[first : first + slab],
            n_words=size,
            **common,
        )
    _scale(sums, dloss_N, largest, targets_N, dx_ND, ignore_index, relative=False)
    return dx_ND, dweight_VD


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _choices(table: dict[int, tuple[Blocks, ...]], x: Tensor) -> tuple[Blocks, ...]:
    return (INTERPRETER_BLOCKS,) if INTERPRETED else table[x.element_size()]


def _constants(x: Tensor) -> dict[str, Any]:
    return {
        "DOUBLE": x.dtype == torch.float64,
        "UPCAST": INTERPRETED and x.element_size() == 2,
    }


def _blocks(rows: int, block_m: int, columns: int, block_n: int) -> int:
    return triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)


def _cut(x_ND: Tensor, n_words: int) -> tuple[int, int]:
    """How many words the backward takes at a time, and into how many parts dx's sums are split."""
    if INTERPRETED:
        return min(1024, triton.cdiv(max(n_words, 1), 16) * 16), 2
    card = sizes.card_of(x_ND.device)
    (n_rows, width), item_size = x_ND.shape, x_ND.element_size()
    slab = sizes.slab_words(n_rows, n_words, item_size, card)
    return slab, sizes.slab_splits(n_rows, width, slab, item_size, card)


def _scale(
    parts_PND: Tensor,
    dloss_N: Tensor,
    largest: Tensor,
    targets_N: Tensor,
    out_ND: Tensor,
    ignore_index: int,
    *,
    relative: bool,
) -> None:
    """Each row of ``parts``, added up, times its ``dloss`` (``relative``: over the largest)."""
    n_parts, n_rows, width = parts_PND.shape
    shape = row_shape(width)
    kernels.scale_kernel.start(
        (triton.cdiv(n_rows, shape["ROWS"]), triton.cdiv(width, shape["COLUMNS"])),
        rows_ptr=parts_PND,
        dloss_ptr=dloss_N,
        largest_ptr=largest,
        targets_ptr=targets_N,
        out_ptr=out_ND,
        n_rows=n_rows,
        n_parts=n_parts,
        width=width,
        ignore_index=ignore_index,
        RELATIVE=relative,
        DOUBLE=dloss_N.dtype == torch.float64,
        **shape,
    )


_WIDE = ("maximum", "sum", "picked", "loss", "lse", "dloss", "largest")


def variants(dtype: str) -> Iterator[Variant]:
    """Every configuration of every kernel."""
    size, double = ITEM_SIZES[dtype], dtype == "fp64"
    wide = "*fp64" if double else "*fp32"
    types = {f"{name}_ptr": wide for name in _WIDE} | {"targets_ptr": "*i64"}
    yield from products("span", kernels.span_kernel, dtype, SPANS[size], {"SPAN": SPAN}, types)
    for name, kernel, table in (
        ("logits", kernels.logit_gradient_kernel, PRODUCTS),
        ("rows", kernels.row_gradient_kernel, ROW_GRADIENT),
        ("words", kernels.word_gradient_kernel, PRODUCTS),
    ):
        yield from products(name, kernel, dtype, table[size], {"GROUP": GROUP}, types)
    constants = {"BLOCK": 128, "DOUBLE": double}
    yield variant("loss", kernels.loss_kernel, dtype, constants, types)
    for width in (100, 2048):
        shape = {**row_shape(width), "DOUBLE": double}
        for relative in (False, True):
            yield variant(
                f"scale-{width}-{relative}",
                kernels.scale_kernel,
                dtype,
                {"RELATIVE": relative, **shape},
                types if relative else {**types, "rows_ptr": wide},
            )
