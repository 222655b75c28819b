"""What the attention kernels share: tiles of rows, and which blocks of keys and queries meet.

Query ``t`` stands at position ``t + S - T`` and sees key ``s`` of the S when ``s <= position +
ahead`` (``ahead`` is 0 for a causal call, else so large that nothing is left out) and ``position -
s < window`` (S where there is no window) or ``s < sinks``. Blocks of which no pair is seen are
left out; blocks of which every pair is seen need no mask; the rest lie on an edge.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    base_ptr,  # (rows, width), channels adjacent
    first,
    rows,
    stride,
    width,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    CHECKED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows ``first`` to ``first + BLOCK``; zeros beyond ``width`` and, if CHECKED, ``rows``."""
    row = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_K)
    # 64 bits for where the tile starts; within it the launcher keeps strides small enough for 32.
    start_ptr = base_ptr + tl.cast(first, tl.int64) * stride
    at = start_ptr + (row[:, None] * stride + channel[None, :])
    if CHECKED:
        inside = (row < rows - first)[:, None]
        if not WHOLE_K:
            inside = inside & (channel < width)[None, :]
        tile = tl.load(at, mask=inside, other=0.0)
    elif WHOLE_K:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(channel < width)[None, :], other=0.0)
    # Triton's interpreter multiplies the bit patterns of bfloat16.
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(
    base_ptr,
    tile,
    first,
    rows,
    stride,
    width,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The counterpart of ``load_rows``."""
    row = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_K)
    start_ptr = base_ptr + tl.cast(first, tl.int64) * stride
    at = start_ptr + (row[:, None] * stride + channel[None, :])
    inside = (row < rows - first)[:, None] & (channel < width)[None, :]
    tl.store(at, tile.to(base_ptr.dtype.element_ty), mask=inside)


@triton.jit
def narrowed(tile, NARROW: tl.constexpr, UPCAST: tl.constexpr):
    """Rounded to the inputs' dtype, for the tensor cores."""
    tile = tile.to(NARROW)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def sees(position, key, n_keys, ahead, window, sinks):
    """Which pairs are seen, by positions and keys that broadcast to a tile."""
    near = (position - key < window) | (key < sinks)
    return near & (key <= position + ahead) & (key < n_keys)


@triton.jit
def clamped(value, limit):
    """``value`` in [0, limit]."""
    return tl.minimum(tl.maximum(value, 0), limit)


@triton.jit
def key_blocks(
    first_query,
    n_queries,
    n_keys,
    ahead,
    window,
    sinks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Blocks of keys that a block of queries sees.

    Returns ``(sunk, start, full_start, full_stop, stop)``: those before ``sunk`` hold sinks,
    ``start`` to ``full_start`` lie on the window's edge, up to ``full_stop`` all is seen, up to
    ``stop`` lies the diagonal or the end of the keys.
    """
    first_position = first_query + n_keys - n_queries
    last_position = tl.minimum(first_position + BLOCK_M, n_keys) - 1
    stop = tl.cdiv(clamped(last_position + ahead + 1, n_keys), BLOCK_N)
    full_stop = clamped(first_position + ahead + 1, n_keys) // BLOCK_N
    start = tl.minimum(clamped(first_position - window + 1, n_keys) // BLOCK_N, stop)
    full_start = tl.cdiv(clamped(last_position - window + 1, n_keys), BLOCK_N)
    full_start = tl.minimum(full_start, stop)
    full_stop = tl.maximum(full_stop, full_start)
    sunk = tl.minimum(tl.cdiv(sinks, BLOCK_N), start)
    return sunk, start, full_start, full_stop, stop


@triton.jit
def query_blocks(
    first_key,
    n_queries,
    n_keys,
    ahead,
    window,
    sinks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Blocks of queries that see a block of keys.

    Returns ``(start, full_start, full_stop, stop)``: edges from ``start`` to ``full_start`` and
    from ``full_stop`` to ``stop``, all seen between them. The last queries lie on an edge where
    they fill no block, so that only edges check for the end.
    """
    past = n_keys - n_queries
    last_key = tl.minimum(first_key + BLOCK_N, n_keys) - 1
    start = clamped(first_key - ahead - past, n_queries) // BLOCK_M
    full_start = tl.cdiv(clamped(last_key - ahead - past, n_queries), BLOCK_M)
    stop = clamped(last_key + window - past, n_queries)
    stop = tl.cdiv(tl.where(first_key < sinks, n_queries, stop), BLOCK_M)
    full_stop = clamped(first_key + window - past, n_queries)
    full_stop = tl.where(last_key < sinks, n_queries, full_stop) // BLOCK_M
    start = tl.minimum(start, stop)
    full_start = tl.minimum(full_start, stop)
    # Where keys are missing from the block, every query needs the mask.
    full_start = tl.where(first_key + BLOCK_N > n_keys, stop, full_start)
    full_stop = tl.maximum(full_stop, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def edge_block(i, before, start, full_start, full_stop):
    """The ``i``-th block that needs a mask: ``before`` from 0 on, then those of both edges."""
    block = i + tl.where(i >= before, start - before, 0)
    return block + tl.where(block >= full_start, full_stop - full_start, 0)
