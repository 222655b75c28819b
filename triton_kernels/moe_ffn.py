"""The expert network in Triton: matrix products over the rows of each expert, nothing padded.

Forward: sort (``_routing``); ``x`` gathered in the load of the first product, the activation in its
epilogue, where the pre-activation is stored as well; the second product on the sorted hidden rows;
each token sums its rows. Backward: the hidden rows' gradient, ``dy`` gathered in the load; what
follows from it and the pre-activation, row by row (as the epilogue of that product it took 255
registers of a thread, which leaves one block to a multiprocessor; apart it costs one more pass over
the hidden rows); one product for each weight over the rows of each expert; the rows' gradient; each
token sums its rows. No atomics and no host synchronisation: the list of row blocks is as long as it
can get, and programs without rows leave.

Accumulation is float32 (float64 for float64). float32 is multiplied exactly (no TF32), on the
ordinary cores. Row blocks are as tall as the rows of an average expert ask for: that the host knows
without waiting.

Not run on a card yet: interpreted, and every configuration compiled for sm_80, 86, 89 and 90. So
nothing here shows that a configuration is the fastest, that loads and products overlap as the
pipeline's stages promise, or that two configurations give the same bits. To be tried with a card:
bulk copies (TMA) and programs that stay on their multiprocessor, for Hopper.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
from pyllm.triton_kernels import _moe_kernels as kernels
from pyllm.triton_kernels import _routing
from pyllm.triton_kernels._tuning import (
    INTERPRETED,
    SMALL,
    WORTH_TIMING,
    Blocks,
    launch_product,
    on_its_card,
    row_shape,
)
from pyllm.triton_kernels._variants import ITEM_SIZES, Variant, products, variant
from torch import Tensor

GROUP = 8
"""Row blocks that walk through the columns together: 1,024 rows of 2,048 numbers of 16 bits are 4
MB, a share of the second-level cache."""

# By item size, then rows of a block. With 16 bits, what needs 99 kB or less runs on every card, up
# to 163 kB on sm_80 too, more on sm_90 alone. So the widest blocks are listed with four stages: on
# sm_80 two products of 128 x 128 in one program spilled 9 kB a thread.
UP_GATED = {
    2: {
        16: (Blocks(16, 64, 64, 4, 4, products=2),),
        64: (Blocks(64, 64, 64, 4, 3, products=2),),
        128: (
            Blocks(128, 64, 64, 8, 3, products=2),
            Blocks(128, 64, 64, 8, 4, products=2),
            Blocks(128, 128, 64, 8, 4, products=2),
        ),
    },
    4: {64: (Blocks(64, 32, 16, 4, 2, products=2),)},
    8: {32: (Blocks(32, 32, 16, 4, 2, products=2),)},
}
UP_PLAIN = {
    2: {
        16: (Blocks(16, 128, 64, 4, 4),),
        64: (Blocks(64, 128, 64, 4, 3),),
        128: (Blocks(128, 128, 64, 8, 3), Blocks(128, 128, 64, 8, 4)),
    },
    4: {64: (Blocks(64, 64, 16, 4, 2),)},
    8: {32: (Blocks(32, 32, 16, 4, 2),)},
}
ROWS = {
    2: {
        16: (Blocks(16, 128, 64, 4, 4),),
        64: (Blocks(64, 128, 64, 4, 3),),
        128: (
            Blocks(128, 128, 64, 8, 3),
            Blocks(128, 128, 64, 8, 4),
            Blocks(128, 256, 64, 8, 4),
        ),
    },
    4: {64: (Blocks(64, 64, 16, 4, 2),)},
    8: {32: (Blocks(32, 32, 16, 4, 2),)},
}
WEIGHT_GRADIENT = {
    2: (Blocks(128, 128, 64, 8, 5, indirect=True), Blocks(128, 256, 64, 8, 7, indirect=True)),
    4: (Blocks(64, 64, 16, 4, 2, indirect=True),),
    8: (Blocks(32, 32, 16, 4, 2, indirect=True),),
}
LEAST_BACKWARD_ROWS = 32
"""Training has more rows than decoding: the backward has no lower row blocks."""


MOST_EXPERTS = 65535
"""The second dimension of a grid ends there."""


def unserved(stage: str, *arguments: Any) -> str | None:
    """Why a call is not served: each expert is a row of programs in the backward's grid."""
    n_experts = arguments[2 if stage == "forward" else 3].shape[0]
    return None if n_experts <= MOST_EXPERTS else f"{n_experts} experts, more than {MOST_EXPERTS}"


def rows_of_block(n_rows: int, n_experts: int, sizes: Any, least: int = 0) -> int:
    """How tall a row block is: one for an average expert if it is small, then the tallest."""
    if INTERPRETED:
        return SMALL.m
    mean = n_rows / n_experts
    fits = [m for m in sizes if m >= least]
    return next((m for m in fits if mean <= m), fits[-1])


@on_its_card
def moe_ffn_forward(
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    experts_NA: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_ffn.moe_ffn_forward`."""
    x_ND, w_in_EFD, w_out_EDF = x_ND.contiguous(), w_in_EFD.contiguous(), w_out_EDF.contiguous()
    n_experts, width, hidden = w_out_EDF.shape
    n_rows, top_k = experts_NA.numel(), experts_NA.shape[1]
    order_R, position_NA, offsets_E1 = _routing.sort_by_expert(experts_NA, n_experts)
    pre_RF = x_ND.new_empty(n_rows, w_in_EFD.shape[1])
    y_ND = torch.empty_like(x_ND)
    if n_rows == 0:
        return y_ND.zero_(), pre_RF, order_R, position_NA, offsets_E1
    size = x_ND.element_size()
    gated = activation == "swiglu"
    block_m = rows_of_block(n_rows, n_experts, ROWS[size])
    tiles = _routing.list_tiles(offsets_E1, n_rows, block_m)
    h_RF = x_ND.new_empty(n_rows, hidden)
    launch_product(
        kernels.up_kernel,
        _choices(UP_GATED if gated else UP_PLAIN, size, block_m),
        lambda c: (tiles.shape[1] * triton.cdiv(hidden, c["BLOCK_N"]),),
        ("width", "hidden"),
        x_ND,
        n_rows * width * hidden >= WORTH_TIMING,
        x_ptr=x_ND,
        w_ptr=w_in_EFD,
        pre_ptr=pre_RF,
        h_ptr=h_RF,
        order_ptr=order_R,
        offsets_ptr=offsets_E1,
        tiles_ptr=tiles,
        n_tiles=tiles.shape[1],
        width=width,
        hidden=hidden,
        top_k=top_k,
        GATED=gated,
        **_shared_constants(x_ND),
    )
    y_RD = x_ND.new_empty(n_rows, width)
    rows = {"tiles": tiles, "block_m": block_m, "order_R": order_R, "offsets_E1": offsets_E1}
    _multiply_rows(h_RF, w_out_EDF, y_RD, by_column=True, **rows)
    _combine(y_RD, weights_NA, position_NA, y_ND)
    return y_ND, pre_RF, order_R, position_NA, offsets_E1


@on_its_card
def moe_ffn_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    w_in_EFD: Tensor,
    w_out_EDF: Tensor,
    weights_NA: Tensor,
    pre_RF: Tensor,
    order_R: Tensor,
    position_NA: Tensor,
    offsets_E1: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.moe_ffn.moe_ffn_backward`."""
    dy_ND, x_ND, pre_RF = dy_ND.to(x_ND.dtype).contiguous(), x_ND.contiguous(), pre_RF.contiguous()
    w_in_EFD, w_out_EDF = w_in_EFD.contiguous(), w_out_EDF.contiguous()
    order_R, position_NA = order_R.int().contiguous(), position_NA.int().contiguous()
    offsets_E1, weights_NA = offsets_E1.int().contiguous(), weights_NA.contiguous()
    n_experts, width, hidden = w_out_EDF.shape
    n_rows, top_k = order_R.numel(), weights_NA.shape[1]
    dx_ND = torch.empty_like(x_ND)
    dw_in, dw_out = torch.empty_like(w_in_EFD), torch.empty_like(w_out_EDF)
    dweights_NA = torch.full_like(weights_NA, float("nan"))  # for an expert that does not exist
    if n_rows == 0:
        return dx_ND.zero_(), dw_in.zero_(), dw_out.zero_(), dweights_NA
    size = x_ND.element_size()
    block_m = rows_of_block(n_rows, n_experts, ROWS[size], LEAST_BACKWARD_ROWS)
    tiles = _routing.list_tiles(offsets_E1, n_rows, block_m)
    dh_RF = x_ND.new_empty(n_rows, hidden)
    rows = {"tiles": tiles, "block_m": block_m, "order_R": order_R, "offsets_E1": offsets_E1}
    _multiply_rows(dy_ND, w_out_EDF, dh_RF, by_column=False, by_token=top_k, **rows)
    dpre_RF = torch.empty_like(pre_RF)
    shape = row_shape(hidden)
    kernels.activation_gradient_kernel.start(
        (triton.cdiv(n_rows, shape["ROWS"]),),
        dh_ptr=dh_RF,
        pre_ptr=pre_RF,
        weights_ptr=weights_NA,
        dpre_ptr=dpre_RF,
        dweights_ptr=dweights_NA,
        order_ptr=order_R,
        offsets_ptr=offsets_E1,
        n_experts=n_experts,
        hidden=hidden,
        GATED=activation == "swiglu",
        DOUBLE=x_ND.dtype == torch.float64,
        **shape,
    )
    h_RF = dh_RF  # by now times their routing weights
    _weight_gradient(dy_ND, h_RF, dw_out, order_R, offsets_E1, top_k, left_by_token=True)
    _weight_gradient(dpre_RF, x_ND, dw_in, order_R, offsets_E1, top_k, left_by_token=False)
    dx_RD = x_ND.new_empty(n_rows, width)
    _multiply_rows(dpre_RF, w_in_EFD, dx_RD, by_column=False, **rows)
    _combine(dx_RD, None, position_NA, dx_ND)
    return dx_ND, dw_in, dw_out, dweights_NA


def _choices(table: dict[int, Any], size: int, block_m: int) -> tuple[Blocks, ...]:
    return (SMALL,) if INTERPRETED else table[size][block_m]


def _shared_constants(x: Tensor) -> dict[str, Any]:
    return {
        "GROUP": GROUP,
        "DOUBLE": x.dtype == torch.float64,
        "UPCAST": INTERPRETED and x.element_size() == 2,
    }


def _multiply_rows(
    a: Tensor,
    w: Tensor,
    out_RD: Tensor,
    *,
    by_column: bool,
    tiles: Tensor,
    block_m: int,
    order_R: Tensor,
    offsets_E1: Tensor,
    by_token: int = 0,
) -> None:
    """``out = a @ w`` with each row's expert; ``by_column``: w is (E, width of out, width of a).

    ``a`` has sorted rows, or with ``by_token`` (the experts of a token) those of the tokens.
    """
    width = out_RD.shape[1]
    launch_product(
        kernels.rows_kernel,
        _choices(ROWS, a.element_size(), block_m),
        lambda c: (tiles.shape[1] * triton.cdiv(width, c["BLOCK_N"]),),
        ("width", "depth", "BY_TOKEN", "BY_COLUMN"),
        a,
        out_RD.numel() * a.shape[1] >= WORTH_TIMING,
        a_ptr=a,
        w_ptr=w,
        out_ptr=out_RD,
        order_ptr=order_R,
        offsets_ptr=offsets_E1,
        tiles_ptr=tiles,
        n_tiles=tiles.shape[1],
        width=width,
        depth=a.shape[1],
        top_k=max(by_token, 1),
        BY_TOKEN=by_token > 0,
        BY_COLUMN=by_column,
        **_shared_constants(a),
    )


def _weight_gradient(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    order_R: Tensor,
    offsets_E1: Tensor,
    top_k: int,
    left_by_token: bool,
) -> None:
    n_experts, height, width = out.shape
    launch_product(
        kernels.weight_gradient_kernel,
        (SMALL,) if INTERPRETED else WEIGHT_GRADIENT[left.element_size()],
        lambda c: (
            triton.cdiv(height, c["BLOCK_M"]) * triton.cdiv(width, c["BLOCK_N"]),
            n_experts,
        ),
        ("height", "width", "LEFT_BY_TOKEN"),
        left,
        order_R.numel() * height * width >= WORTH_TIMING,
        left_ptr=left,
        right_ptr=right,
        out_ptr=out,
        order_ptr=order_R,
        offsets_ptr=offsets_E1,
        height=height,
        width=width,
        top_k=top_k,
        LEFT_BY_TOKEN=left_by_token,
        **_shared_constants(left),
    )


def _combine(
    rows_RD: Tensor, weights_NA: Tensor | None, position_NA: Tensor, out_ND: Tensor
) -> None:
    n_tokens, width = out_ND.shape
    shape = row_shape(width)
    kernels.combine_kernel.start(
        (triton.cdiv(n_tokens, shape["ROWS"]), triton.cdiv(width, shape["COLUMNS"])),
        rows_ptr=rows_RD,
        weights_ptr=position_NA if weights_NA is None else weights_NA.contiguous(),
        position_ptr=position_NA,
        out_ptr=out_ND,
        n_tokens=n_tokens,
        width=width,
        top_k=position_NA.shape[1],
        WEIGHTED=weights_NA is not None,
        DOUBLE=out_ND.dtype == torch.float64,
        **shape,
    )


_TYPES = {
    "order_ptr": "*i32",
    "offsets_ptr": "*i32",
    "tiles_ptr": "*i32",
    "position_ptr": "*i32",
    "weights_ptr": "*fp32",
    "dweights_ptr": "*fp32",
}


def variants(dtype: str) -> Iterator[Variant]:
    """Every configuration of every kernel."""
    size, double = ITEM_SIZES[dtype], dtype == "fp64"
    if dtype == "fp32":  # the sort knows no dtype
        yield from _routing.variants()
    for gated, table in ((False, UP_PLAIN), (True, UP_GATED)):
        constants = {"GATED": gated, "GROUP": GROUP}
        for blocks in table[size].values():
            yield from products(f"up-{gated}", kernels.up_kernel, dtype, blocks, constants, _TYPES)
    # The forward's second product; then both of the backward, which has no low row blocks.
    for by_token, by_column in ((False, True), (True, False), (False, False)):
        constants = {"BY_TOKEN": by_token, "BY_COLUMN": by_column, "GROUP": GROUP}
        name = f"rows-{by_token}-{by_column}"
        for block_m, blocks in ROWS[size].items():
            if block_m >= LEAST_BACKWARD_ROWS or by_column:
                yield from products(name, kernels.rows_kernel, dtype, blocks, constants, _TYPES)
    for by_token in (False, True):
        yield from products(
            f"weights-{by_token}",
            kernels.weight_gradient_kernel,
            dtype,
            WEIGHT_GRADIENT[size],
            {"LEFT_BY_TOKEN": by_token, "GROUP": GROUP},
            _TYPES,
        )
    for width in (100, 2048):
        shape = {**row_shape(width), "DOUBLE": double}
        for flag in (False, True):
            yield variant(
                f"combine-{width}-{flag}",
                kernels.combine_kernel,
                dtype,
                {"WEIGHTED": flag, **shape},
                _TYPES,
            )
            yield variant(
                f"activation-{width}-{flag}",
                kernels.activation_gradient_kernel,
                dtype,
                {"GATED": flag, **shape},
                _TYPES,
            )
