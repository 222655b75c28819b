"""The products of ``linear_cross_entropy`` over blocks of rows and words; the sums after them."""

import triton
import triton.language as tl
from pyllm.triton_kernels._products import multiply, place, sixteens
from pyllm.triton_kernels._tuning import Kernel


@triton.jit
def finite(maximum):
    """What to subtract before the exponential: 0 where the maximum is infinite."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@Kernel
def span_kernel(
    x_ptr,  # (N, D) contiguous
    w_ptr,  # (V, D) contiguous
    targets_ptr,  # (N,) int64
    maximum_ptr,  # (spans, N) in the accumulation dtype
    sum_ptr,  # (spans, N)
    picked_ptr,  # (N,), where the target is among the words of this span
    n_rows,
    n_words,
    width,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOUBLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The largest logit of ``SPAN`` words, the sum of the exponentials, and the target's logit.

    The row blocks of a span are neighbours, so that they find its words in the second-level cache.
    """
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    n_blocks = tl.cdiv(n_rows, BLOCK_M)
    span = tl.program_id(0) // n_blocks
    rows = tl.program_id(0) % n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    targets = tl.load(targets_ptr + rows, mask=inside, other=-1)
    mine = (targets >= span * SPAN) & (targets < tl.minimum(span * SPAN + SPAN, n_words))
    # 32 bits: compared with every word of a block, 64 would take half the registers.
    targets = tl.where(mine, targets, -1).to(tl.int32)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK_M], dtype=ACC)
    picked = tl.zeros([BLOCK_M], dtype=ACC)
    first = span * SPAN
    last = tl.minimum(first + SPAN, n_words)
    for start in range(first, last, BLOCK_N):
        words = start + tl.arange(0, BLOCK_N)
        z = multiply(
            x_ptr,
            rows.to(tl.int64) * width,
            inside,
            w_ptr,
            words,
            n_words,
            width,
            width,
            True,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            ACC,
            UPCAST,
        )
        picked += tl.sum(tl.where(words[None, :] == targets[:, None], z, 0.0), axis=1)
        z = tl.where((words < n_words)[None, :], z, float("-inf"))
        # Without the NaNs, which reach the sum all the same; the interpreter warns of them.
        larger = tl.maximum(maximum, tl.max(tl.where(z == z, z, float("-inf")), axis=1))
        shift = finite(larger)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        maximum = larger
    at = span.to(tl.int64) * n_rows + rows
    tl.store(maximum_ptr + at, maximum, mask=inside)
    tl.store(sum_ptr + at, total, mask=inside)
    tl.store(picked_ptr + rows, picked, mask=mine)


@Kernel
def loss_kernel(
    maximum_ptr,  # (spans, N) in the accumulation dtype
    sum_ptr,  # (spans, N)
    picked_ptr,  # (N,)
    targets_ptr,  # (N,) int64
    loss_ptr,  # (N,)
    lse_ptr,  # (N,)
    n_rows,
    n_spans,
    ignore_index,
    BLOCK: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """The spans of each row together, in their order."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n_rows
    maximum = tl.full([BLOCK], float("-inf"), dtype=ACC)
    at = maximum_ptr + rows
    for _ in range(n_spans):
        maximum = tl.maximum(maximum, tl.load(at, mask=inside, other=0.0))
        at += n_rows
    shift = finite(maximum)
    total = tl.zeros([BLOCK], dtype=ACC)
    at = maximum_ptr + rows
    sum_at = sum_ptr + rows
    for _ in range(n_spans):
        part = tl.load(sum_at, mask=inside, other=0.0)
        total += part * tl.exp(tl.load(at, mask=inside, other=0.0) - shift)
        at += n_rows
        sum_at += n_rows
    lse = shift + tl.log(tl.where(inside, total, 1.0))
    targets = tl.load(targets_ptr + rows, mask=inside, other=0)
    picked = tl.load(picked_ptr + rows, mask=inside, other=0.0)
    tl.store(lse_ptr + rows, lse, mask=inside)
    tl.store(loss_ptr + rows, tl.where(targets == ignore_index, 0.0, lse - picked), mask=inside)


@Kernel
def logit_gradient_kernel(
    x_ptr,  # (N, D) contiguous
    w_ptr,  # (words of the slab, D) contiguous
    targets_ptr,  # (N,) int64
    lse_ptr,  # (N,) in the accumulation dtype
    dz_ptr,  # (N, stride): rows of the slab's words
    n_rows,
    n_words,
    width,
    stride,
    first_word,
    ignore_index,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOUBLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``softmax(x @ w.T) - [word is the target]`` for a slab of words: not times ``dloss`` yet, so
    that it is of order one also where that is too small for float16. Zeros up to 16 words."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row_block, block = place(tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_words, BLOCK_N), GROUP)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    words = block * BLOCK_N + tl.arange(0, BLOCK_N)
    z = multiply(
        x_ptr,
        rows.to(tl.int64) * width,
        inside,
        w_ptr,
        words,
        n_words,
        width,
        width,
        True,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        ACC,
        UPCAST,
    )
    targets = tl.load(targets_ptr + rows, mask=inside, other=ignore_index)
    lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
    z = tl.where((words < n_words)[None, :], z, float("-inf"))
    mine = (targets >= first_word) & (targets < first_word + n_words)
    hit = words[None, :] == tl.where(mine, targets - first_word, -1).to(tl.int32)[:, None]
    dz = tl.exp(z - lse[:, None]) - tl.where(hit, 1.0, 0.0)
    dz *= tl.where(targets == ignore_index, 0.0, 1.0)[:, None]  # a NaN is not hidden
    dz_ptr += (row_block * BLOCK_M).to(tl.int64) * stride
    at = tl.arange(0, BLOCK_M)[:, None] * stride + words[None, :]
    keep = inside[:, None] & (words < sixteens(n_words))[None, :]
    tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=keep)


@Kernel
def row_gradient_kernel(
    dz_ptr,  # (N, stride)
    w_ptr,  # (words of the slab, D) contiguous
    sum_ptr,  # (splits, N, D) in the accumulation dtype: added to
    n_rows,
    n_words,
    width,
    stride,
    words_per_split,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOUBLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``sum[split] += dz @ w`` over the split's words of this slab."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row_block, block = place(tl.cdiv(n_rows, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    split = tl.program_id(1).to(tl.int64)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < n_rows
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split * words_per_split
    depth = tl.minimum(n_words - first, words_per_split).to(tl.int32)
    total = multiply(
        dz_ptr + first,
        rows.to(tl.int64) * stride,
        inside,
        w_ptr + first * width,
        columns,
        width,
        depth,
        sixteens(depth),
        False,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        ACC,
        UPCAST,
    )
    sum_ptr += (split * n_rows + row_block * BLOCK_M) * width
    at = sum_ptr + tl.arange(0, BLOCK_M)[:, None] * width + columns[None, :]
    keep = inside[:, None] & (columns < width)[None, :]
    tl.store(at, total + tl.load(at, mask=keep, other=0.0), mask=keep)


@Kernel
def scale_kernel(
    rows_ptr,  # (parts, N, D) contiguous
    dloss_ptr,  # (N,) in the accumulation dtype
    largest_ptr,  # () in the accumulation dtype
    targets_ptr,  # (N,) int64
    out_ptr,  # (N, D)
    n_rows,
    n_parts,
    width,
    ignore_index,
    RELATIVE: tl.constexpr,  # divide by the largest
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """The sum of a row's parts, in their order, times its ``dloss``; 0 for a row without loss."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = rows < n_rows
    inside = known[:, None] & (columns < width)[None, :]
    total = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for part in range(n_parts):
        at = rows_ptr + (rows + part * n_rows)[:, None] * width + columns[None, :]
        total += tl.load(at, mask=inside, other=0.0).to(ACC)
    factor = tl.load(dloss_ptr + rows, mask=known, other=0.0)
    if RELATIVE:
        factor = factor / tl.load(largest_ptr)
    targets = tl.load(targets_ptr + rows, mask=known, other=ignore_index)
    total *= tl.where(targets == ignore_index, 0.0, factor)[:, None]
    at = out_ptr + rows[:, None] * width + columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)


@Kernel
def word_gradient_kernel(
    dz_ptr,  # (N, stride)
    x_ptr,  # (N, D) contiguous, times dloss over its largest
    largest_ptr,  # () in the accumulation dtype
    dw_ptr,  # (words of the slab, D)
    n_rows,
    n_words,
    width,
    stride,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOUBLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``dw = dz.T @ x`` for the words of a slab, over all rows in their order."""
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row_block, block = place(tl.cdiv(n_words, BLOCK_M), tl.cdiv(width, BLOCK_N), GROUP)
    words = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    dz_at = dz_ptr + steps[None, :].to(tl.int64) * stride + words[:, None]
    x_at = x_ptr + steps[:, None].to(tl.int64) * width + columns[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, n_rows, BLOCK_K):
        inside = steps < n_rows - start
        known = (words < sixteens(n_words))[:, None]
        dz = tl.load(dz_at, mask=inside[None, :] & known, other=0.0)
        x = tl.load(x_at, mask=inside[:, None] & (columns < width)[None, :], other=0.0)
        if UPCAST:
            dz, x = dz.to(tl.float32), x.to(tl.float32)
        total = tl.dot(dz, x, total, input_precision="ieee", out_dtype=ACC)
        dz_at += BLOCK_K * stride
        x_at += BLOCK_K * width
    total *= tl.load(largest_ptr)
    dw_ptr += (row_block * BLOCK_M).to(tl.int64) * width
    at = tl.arange(0, BLOCK_M)[:, None] * width + columns[None, :]
    keep = (words < n_words)[:, None] & (columns < width)[None, :]
    tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=keep)
