"""The matrix products of ``moe_ffn`` over the rows of each expert, and what goes on around them.

A program of a row product takes one entry of the list that ``_routing.list_tiles`` makes, an expert
and its first row, and one block of columns; it leaves where the list has ended. All loads are
masked with 0, so that nothing beyond an edge, NaN or not, enters a sum. ``UPCAST`` is set in the
interpreter alone, which multiplies 16-bit numbers wrongly.
"""

import triton
import triton.language as tl
from pyllm.triton_kernels._products import multiply, place
from pyllm.triton_kernels._tuning import Kernel


@triton.jit
def sigmoid(x):
    """Without an exponential that is infinite."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def gelu_gate(x):
    """What x is multiplied with: (1 + tanh z) / 2 is the sigmoid of 2 z."""
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@Kernel
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
            gate = tl.dot(x, w_gate, gate, input_precision="ieee", out_dtype=ACC)
            up = tl.dot(x, w_up, up, input_precision="ieee", out_dtype=ACC)
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


@Kernel
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


@Kernel
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """All that ``dh = dy @ w_out``, not yet weighted, leads to, row by row.

    Through the activation to ``dpre``; the routing weight's gradient ``<dh, h>``; and ``h`` times
    the weight, of which w_out's gradient is made.
    """
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows after the last are those of experts that do not exist.
    known = rows < tl.load(offsets_ptr + n_experts)
    slots = tl.load(order_ptr + rows, mask=known, other=0)
    weight = tl.load(weights_ptr + slots, mask=known, other=0.0).to(ACC)[:, None]
    dh_rows = rows[:, None].to(tl.int64) * hidden
    pre_rows = dh_rows * 2 if GATED else dh_rows
    sums = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for start in range(0, hidden, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = known[:, None] & (columns < hidden)
        dh = tl.load(dh_ptr + dh_rows + columns, mask=inside, other=0.0).to(ACC)
        pre_at = pre_ptr + pre_rows + columns
        dpre_at = dpre_ptr + pre_rows + columns
        if GATED:
            gate = tl.load(pre_at, mask=inside, other=0.0).to(ACC)
            up = tl.load(pre_at + hidden, mask=inside, other=0.0).to(ACC)
            s = sigmoid(gate)
            h = gate * s * up
            dgate = dh * weight * up * s * (1.0 + gate * (1.0 - s))
            dup = dh * weight * gate * s
            tl.store(dpre_at, dgate.to(dpre_ptr.dtype.element_ty), mask=inside)
            tl.store(dpre_at + hidden, dup.to(dpre_ptr.dtype.element_ty), mask=inside)
        else:
            pre = tl.load(pre_at, mask=inside, other=0.0).to(ACC)
            s = gelu_gate(pre)
            h = pre * s
            slope = 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * pre * pre)
            dpre = dh * weight * (s + pre * (s * (1.0 - s)) * slope)
            tl.store(dpre_at, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)
        sums += dh * h
        h = (h * weight).to(dh_ptr.dtype.element_ty)
        # Written where dh was read, perhaps by other threads: Triton cuts loads and stores apart.
        tl.debug_barrier()
        tl.store(dh_ptr + dh_rows + columns, h, mask=inside)
    dweights = tl.sum(sums, axis=1).to(dweights_ptr.dtype.element_ty)
    tl.store(dweights_ptr + slots, dweights, mask=known)


@Kernel
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
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACC)
    out_at = expert.to(tl.int64) * height * width + ups[:, None].to(tl.int64) * width
    keep = (ups < height)[:, None] & (columns < width)[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_at + columns[None, :], out, mask=keep)


@Kernel
def combine_kernel(
    rows_ptr,  # (R, D) contiguous, sorted
    weights_ptr,  # (N, k), or unused
    position_ptr,  # (N, k) int32
    out_ptr,  # (N, D)
    n_tokens,
    width,
    top_k,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Each token's sum over its rows, in the order of its choices."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = tokens < n_tokens
    inside = known[:, None] & (columns < width)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for choice in range(top_k):
        slots = tokens * top_k + choice
        rows = tl.load(position_ptr + slots, mask=known, other=0).to(tl.int64)[:, None]
        at = rows_ptr + tl.maximum(rows, 0) * width + columns[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(ACC)
        value = tl.where(rows >= 0, value, float("nan"))  # there is no such expert
        if WEIGHTED:
            value *= tl.load(weights_ptr + slots, mask=known, other=0.0).to(ACC)[:, None]
        total += value
    at = out_ptr + tokens[:, None] * width + columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)
