"""Row counts for matrix products, chosen so that few distinct ones occur.

The products are PyTorch's: bitwise the same from run to run, but on another number of threads only
where the library does not split the sum. Measured: it does for small results of long sums, such as
(100, 1024) times (1024, 64). What surrounds the products is the same on any number of threads.
"""

import torch

_STEP = 64
"""Largest multiple that row counts are rounded up to."""

SLACK = _STEP - 1
"""By how many rows, at most, :func:`rounded` exceeds what it was given."""


def rounded(rows: int, dtype: torch.dtype) -> int:
    """``rows`` rounded up to 1, 2, 4, ..., 64 or a multiple of 64, for 16-bit dtypes.

    Products in those run in oneDNN, which compiles a kernel for every new shape: 2.7 ms measured
    on a 2-core machine, 20 times the product itself. The rows of an expert are a new number at
    every step. float32 and float64 run in BLAS, which compiles nothing: they keep their number.
    """
    if dtype.itemsize > 2 or rows == 0:
        return rows
    if rows < _STEP:
        return 1 << (rows - 1).bit_length()
    return -(-rows // _STEP) * _STEP
