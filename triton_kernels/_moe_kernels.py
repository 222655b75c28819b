"""The matrix products of ``moe_ffn`` over the rows of each expert, and the sums around them.

A program of a row product takes one entry of the list that ``_routing.list_tiles`` makes, an expert
and its first row, and one block of columns; it leaves where the list has ended. All loads are
masked with 0, so that nothing beyond an edge, NaN or not, enters a sum. ``UPCAST`` is set in the
interpreter alone, which multiplies 16-bit numbers wrongly.
"""

import triton
import triton.language as tl
from pyllm.triton_kernels._products import multiply, place


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gelu_gate(x):
    """What x is multiplied with: (1 + tanh z) / 2 is the sigmoid of 2 z."""
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def up_kernel(
    x_ptr,  # (N, D) contiguous
    w_ptr,  # (E, 2F or F, D) contiguous
    pre_ptr,  # (R, 2F or F), sorted
    h_ptr,  # (R, F), sorted
    order_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (2, tiles) int32
    n_tiles,
    width,
    hidden,
    top_k,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOUBLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``pre = x[tokens] @ w.T`` and ``h = activation(pre)``: the gather is in the load."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    tile, column = place(n_tiles, tl.cdiv(hidden, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + n_tiles + tile)
    ups = tl.arange(0, BLOCK_M)
    inside = first + ups < tl.load(offsets_ptr + expert + 1)
    tokens = tl.load(order_ptr + first + ups, mask=inside, other=0) // top_k
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    keep = inside[:, None] & (columns < hidden)[None, :]
    h_ptr += first.to(tl.int64) * hidden
    h_at = ups[:, None] * hidden + columns[None, :]
    x_rows = tokens.to(tl.int64) * width
    if GATED:
        w_ptr += expert * 2 * hidden * width
        steps = tl.arange(0, BLOCK_K)
        known = (columns < hidden)[None, :]
        x_at = x_ptr + x_rows[:, None] + steps[None, :]
        gate_at = w_ptr + columns[None, :].to(tl.int64) * width + steps[:, None]
        up_at = w_ptr + (columns[None, :].to(tl.int64) + hidden) * width + steps[:, None]
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        for start in range(0, width, BLOCK_K):
            left = steps < width - start
            x = tl.load(x_at, mask=inside[:, None] & left[None, :], other=0.0)
            w_gate = tl.load(gate_at, mask=left[:, None] & known, other=0.0)
            w_up = tl.load(up_at, mask=left[:, None] & known, other=0.0)
            if UPCAST:
                x, w_gate, w_up = x.to(tl.float32), w_gate.to(tl.float32), w_up.to(tl.float32)
            gate = tl.dot(x, w_gate, gate, input_precision="ieee")
            up = tl.dot(x, w_up, up, input_precision="ieee")
            x_at += BLOCK_K
            gate_at += BLOCK_K
            up_at += BLOCK_K
        # Rounded as they are stored: half the registers, and what the backward will see.
        gate, up = gate.to(pre_ptr.dtype.element_ty), up.to(pre_ptr.dtype.element_ty)
        pre_ptr += first.to(tl.int64) * 2 * hidden
        pre_at = ups[:, None] * (2 * hidden) + columns[None, :]
        tl.store(pre_ptr + pre_at, gate, mask=keep)
        tl.store(pre_ptr + pre_at + hidden, up, mask=keep)
        gate = gate.to(ACC)
        h = gate * sigmoid(gate) * up.to(ACC)
    else:
        w_ptr += expert * hidden * width
        pre = multiply(
            x_ptr,
            x_rows,
            inside,
            w_ptr,
            columns,
            hidden,
            width,
            True,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            ACC,
            UPCAST,
        )
        pre = pre.to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + first.to(tl.int64) * hidden + h_at, pre, mask=keep)
        pre = pre.to(ACC)
        h = pre * gelu_gate(pre)
    tl.store(h_ptr + h_at, h.to(h_ptr.dtype.element_ty), mask=keep)


@triton.jit
def rows_kernel(
    a_ptr,  # (R, depth) contiguous, sorted; or (N, depth)
    w_ptr,  # (E, width, depth) contiguous, or (E, depth, width)
    out_ptr,  # (R, width), sorted
    order_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    tiles_ptr,  # (2, tiles) int32
    n_tiles,
    width,
    depth,
    top_k,
    BY_TOKEN: tl.constexpr,  # a is (N, depth)
    BY_COLUMN: tl.constexpr,  # w is (E, width, depth)
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOUBLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``out = a @ w`` for the rows of each expert."""
    tile, column = place(n_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    expert = tl.load(tiles_ptr + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tiles_ptr + n_tiles + tile)
    ups = tl.arange(0, BLOCK_M)
    inside = first + ups < tl.load(offsets_ptr + expert + 1)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if BY_TOKEN:
        tokens = tl.load(order_ptr + first + ups, mask=inside, other=0) // top_k
        a_rows = tokens.to(tl.int64) * depth
    else:
        a_ptr += first.to(tl.int64) * depth
        a_rows = ups * depth
    out = multiply(
        a_ptr,
        a_rows,
        inside,
        w_ptr + expert * width * depth,
        columns,
        width,
        depth,
        BY_COLUMN,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        tl.float64 if DOUBLE else tl.float32,
        UPCAST,
    )
    out_ptr += first.to(tl.int64) * width
    out_at = ups[:, None] * width + columns[None, :]
    keep = inside[:, None] & (columns < width)[None, :]
    tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def activation_gradient_kernel(
    dh_ptr,  # (R, F), sorted: on entry dy @ w_out, on return the hidden rows times their weights
    pre_ptr,  # (R, 2F or F), sorted
    weights_ptr,  # (R,) by slot
    dpre_ptr,  # (R, 2F or F), sorted
    dweights_ptr,  # (R,) by slot
    order_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    n_experts,
    hidden,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """All that a row of ``dh = dy @ w_out``, not yet weighted, leads to; a program for each row.

    Through the activation to ``dpre``; the routing weight's gradient ``<dh, h>``; and ``h`` times
    the weight, of which w_out's gradient is made.
    """
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(offsets_ptr + n_experts):
        return  # the choice of an expert that does not exist
    slot = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + slot).to(ACC)
    dh_ptr += row * hidden
    pre_ptr += row * hidden
    dpre_ptr += row * hidden
    if GATED:
        pre_ptr += row * hidden
        dpre_ptr += row * hidden
    sums = tl.zeros([BLOCK], dtype=ACC)
    for start in range(0, hidden, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < hidden
        dh = tl.load(dh_ptr + columns, mask=inside, other=0.0).to(ACC)
        if GATED:
            gate = tl.load(pre_ptr + columns, mask=inside, other=0.0).to(ACC)
            up = tl.load(pre_ptr + hidden + columns, mask=inside, other=0.0).to(ACC)
            s = sigmoid(gate)
            h = gate * s * up
            dgate = dh * weight * up * s * (1.0 + gate * (1.0 - s))
            dup = dh * weight * gate * s
            tl.store(dpre_ptr + columns, dgate.to(dpre_ptr.dtype.element_ty), mask=inside)
            tl.store(dpre_ptr + hidden + columns, dup.to(dpre_ptr.dtype.element_ty), mask=inside)
        else:
            pre = tl.load(pre_ptr + columns, mask=inside, other=0.0).to(ACC)
            s = gelu_gate(pre)
            h = pre * s
            slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * pre * pre)
            dpre = dh * weight * (s + pre * (s * (1.0 - s)) * slope)
            tl.store(dpre_ptr + columns, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        sums += dh * h
        tl.store(dh_ptr + columns, (h * weight).to(dh_ptr.dtype.element_ty), mask=inside)
    dweight = tl.sum(sums, axis=0)
    tl.store(dweights_ptr + slot, dweight.to(dweights_ptr.dtype.element_ty))


@triton.jit
def weight_gradient_kernel(
    left_ptr,  # (R, height) sorted, or (N, height)
    right_ptr,  # (R, width) sorted, or (N, width)
    out_ptr,  # (E, height, width)
    order_ptr,  # (R,) int32
    offsets_ptr,  # (E + 1,) int32
    height,
    width,
    top_k,
    LEFT_BY_TOKEN: tl.constexpr,  # left is (N, height) and right (R, width); else the reverse
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOUBLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``out[e] = left.T @ right`` over the rows of expert ``e``, in their order: always the same
    bits, and zeros for an expert without rows."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row_block, column_block = place(tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    expert = tl.program_id(1)
    begin = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    ups = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(begin, end, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        inside = rows < end
        tokens = (tl.load(order_ptr + rows, mask=inside, other=0) // top_k).to(tl.int64)
        if LEFT_BY_TOKEN:
            left_rows, right_rows = tokens, rows.to(tl.int64)
        else:
            left_rows, right_rows = rows.to(tl.int64), tokens
        left = tl.load(
            left_ptr + left_rows[None, :] * height + ups[:, None],
            mask=inside[None, :] & (ups < height)[:, None],
            other=0.0,
        )
        right = tl.load(
            right_ptr + right_rows[:, None] * width + columns[None, :],
            mask=inside[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total = tl.dot(left, right, total, input_precision="ieee")
    out_at = expert.to(tl.int64) * height * width + ups[:, None].to(tl.int64) * width
    keep = (ups < height)[:, None] & (columns < width)[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at + columns[None, :], out, mask=keep)


@triton.jit
def combine_kernel(
    rows_ptr,  # (R, D) contiguous, sorted
    weights_ptr,  # (N, k), or unused
    position_ptr,  # (N, k) int32
    out_ptr,  # (N, D)
    width,
    top_k,
    WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Each token's sum over its rows, in the order of its choices."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < width
    total = tl.zeros([BLOCK_D], dtype=ACC)
    for choice in range(top_k):
        slot = token * top_k + choice
        row = tl.load(position_ptr + slot).to(tl.int64)
        at = rows_ptr + tl.maximum(row, 0) * width + columns
        value = tl.load(at, mask=inside, other=0.0).to(ACC)
        value = tl.where(row >= 0, value, float("nan"))  # there is no such expert
        if WEIGHTED:
            value *= tl.load(weights_ptr + slot).to(ACC)
        total += value
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
