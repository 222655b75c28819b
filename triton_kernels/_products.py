"""What the kernels with matrix products share.

All loads are masked with 0, so that nothing beyond an edge, NaN or not, enters a sum. ``UPCAST`` is
set in the interpreter alone, which multiplies 16-bit numbers wrongly.
"""

import triton
import triton.language as tl


@triton.jit
def place(n_tiles, n_columns, GROUP: tl.constexpr):
    """(row block, column block) of this program: ``GROUP`` row blocks share what they read of the
    right-hand side while it is in the second-level cache."""
    program = tl.program_id(0)
    per_group = GROUP * n_columns
    first = program // per_group * GROUP
    height = tl.minimum(n_tiles - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def sixteens(n):
    """``n`` rounded up to a multiple of 16, and known for one.

    A mask may end there without cutting a load of 16 bytes in two: those of numbers that end
    anywhere are made one by one, and not in the background.
    """
    return (n + 15) // 16 * 16


@triton.jit
def multiply(
    a_ptr,
    a_rows,  # (BLOCK_M,): where each row of the left-hand side starts
    a_inside,  # (BLOCK_M,)
    b_ptr,
    columns,  # (BLOCK_N,)
    n_columns,
    depth,
    a_depth,  # at least depth; a has zeros in between
    B_BY_COLUMN: tl.constexpr,  # b is (columns, depth), else (depth, columns)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of ``a @ b``, added up in ``ACC``."""
    steps = tl.arange(0, BLOCK_K)
    b_inside = columns < n_columns
    a_at = a_ptr + a_rows[:, None] + steps[None, :]
    if B_BY_COLUMN:
        b_at = b_ptr + columns[None, :].to(tl.int64) * depth + steps[:, None]
    else:
        b_at = b_ptr + steps[:, None].to(tl.int64) * n_columns + columns[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, depth, BLOCK_K):
        inside = steps < depth - start
        a_steps = steps < a_depth - start
        a = tl.load(a_at, mask=a_inside[:, None] & a_steps[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & b_inside[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=ACC)
        a_at += BLOCK_K
        b_at += BLOCK_K if B_BY_COLUMN else BLOCK_K * n_columns
    return total
