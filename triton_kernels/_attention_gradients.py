"""The kernels of attention's backward; see :mod:`pyllm.triton_kernels.attention`."""

import triton
import triton.language as tl
from pyllm.triton_kernels._attention_blocks import (
    edge_block,
    key_blocks,
    load_rows,
    narrowed,
    query_blocks,
    sees,
    store_rows,
)
from pyllm.triton_kernels._tuning import Kernel


@Kernel
def delta_kernel(
    dy_ptr,  # (B, T, H, K) with adjacent channels
    y_ptr,
    lse_ptr,  # (B, H, T)
    delta_ptr,  # (B, H, delta_stride_h): scale * rowsum(dy * y), then zeros
    base_ptr,  # the same: the log-sum-exp in base 2; inf for rows that see nothing, then inf
    dy_stride_b,
    dy_stride_t,
    dy_stride_h,
    y_stride_b,
    y_stride_t,
    y_stride_h,
    delta_stride_h,  # whole blocks of queries, which all others read without a mask
    scale,
    n_queries,
    n_heads,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
):
    blocks = delta_stride_h // BLOCK_M
    row_of_heads = tl.program_id(0) // blocks
    first = (tl.program_id(0) % blocks) * BLOCK_M
    batch = tl.cast(row_of_heads // n_heads, tl.int64)
    head = tl.cast(row_of_heads % n_heads, tl.int64)
    dy_ptr += batch * dy_stride_b + head * dy_stride_h
    y_ptr += batch * y_stride_b + head * y_stride_h
    dy = load_rows(
        dy_ptr, first, n_queries, dy_stride_t, width, BLOCK_M, BLOCK_K, WHOLE_K, True, False
    )
    y = load_rows(
        y_ptr, first, n_queries, y_stride_t, width, BLOCK_M, BLOCK_K, WHOLE_K, True, False
    )
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1) * scale
    rows = first + tl.arange(0, BLOCK_M)
    lse_ptr += tl.cast(row_of_heads, tl.int64) * n_queries
    lse = tl.load(lse_ptr + rows, mask=rows < n_queries, other=float("-inf"))
    base = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    at = tl.cast(row_of_heads, tl.int64) * delta_stride_h + rows
    tl.store(delta_ptr + at, delta)
    tl.store(base_ptr + at, base)


@triton.jit
def _query_gradient(
    dq,
    q,
    dy,
    delta,
    base,
    k_ptr,
    v_ptr,
    first_key,
    positions,
    k_stride_s,
    v_stride_s,
    scale,
    scale_2,
    n_keys,
    width,
    ahead,
    window,
    sinks,
    EDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What one block of keys adds to dQ of a block of queries."""
    NARROW: tl.constexpr = k_ptr.dtype.element_ty
    k = load_rows(
        k_ptr, first_key, n_keys, k_stride_s, width, BLOCK_N, BLOCK_K, WHOLE_K, EDGE, UPCAST
    )
    v = load_rows(
        v_ptr, first_key, n_keys, v_stride_s, width, BLOCK_N, BLOCK_K, WHOLE_K, EDGE, UPCAST
    )
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    power = s * scale_2 - base[:, None]
    if EDGE:
        keys = first_key + tl.arange(0, BLOCK_N)
        seen = sees(positions[:, None], keys[None, :], n_keys, ahead, window, sinks)
        power = tl.where(seen, power, float("-inf"))
    p = tl.exp2(power)
    dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
    ds = p * (dp * scale - delta[:, None])
    return tl.dot(narrowed(ds, NARROW, UPCAST), k, dq, input_precision="ieee")


@Kernel
def dq_kernel(
    dy_ptr,  # (B, T, H, K) with adjacent channels, as q, k and v
    q_ptr,
    k_ptr,  # (B, S, G, K)
    v_ptr,
    delta_ptr,  # (B, H, delta_stride_h), see delta_kernel
    base_ptr,
    dq_ptr,  # (B, T, H, K) contiguous
    dy_stride_b,
    dy_stride_t,
    dy_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    delta_stride_h,
    scale,
    scale_2,  # times log2(e)
    n_queries,
    n_keys,
    n_heads,
    share,  # query heads to a kv head
    width,
    ahead,
    window,
    sinks,
    situation,  # for the tuner alone
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    blocks = tl.cdiv(n_queries, BLOCK_M)
    row_of_heads = tl.program_id(0) // blocks
    # The last queries of a causal call see most keys: they start first.
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    batch = tl.cast(row_of_heads // n_heads, tl.int64)
    head = tl.cast(row_of_heads % n_heads, tl.int64)
    dy_ptr += batch * dy_stride_b + head * dy_stride_h
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + (head // share) * k_stride_g
    v_ptr += batch * v_stride_b + (head // share) * v_stride_g

    q = load_rows(
        q_ptr, first, n_queries, q_stride_t, width, BLOCK_M, BLOCK_K, WHOLE_K, True, UPCAST
    )
    dy = load_rows(
        dy_ptr, first, n_queries, dy_stride_t, width, BLOCK_M, BLOCK_K, WHOLE_K, True, UPCAST
    )
    rows = first + tl.arange(0, BLOCK_M)
    at = tl.cast(row_of_heads, tl.int64) * delta_stride_h + rows
    delta = tl.load(delta_ptr + at)
    base = tl.load(base_ptr + at)
    positions = rows + n_keys - n_queries
    sunk, start, full_start, full_stop, stop = key_blocks(
        first, n_queries, n_keys, ahead, window, sinks, BLOCK_M, BLOCK_N
    )
    dq = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for block in range(full_start, full_stop):
        dq = _query_gradient(
            dq,
            q,
            dy,
            delta,
            base,
            k_ptr,
            v_ptr,
            block * BLOCK_N,
            positions,
            k_stride_s,
            v_stride_s,
            scale,
            scale_2,
            n_keys,
            width,
            ahead,
            window,
            sinks,
            False,
            BLOCK_N,
            BLOCK_K,
            WHOLE_K,
            UPCAST,
        )
    for i in range(sunk + full_start - start + stop - full_stop):
        dq = _query_gradient(
            dq,
            q,
            dy,
            delta,
            base,
            k_ptr,
            v_ptr,
            edge_block(i, sunk, start, full_start, full_stop) * BLOCK_N,
            positions,
            k_stride_s,
            v_stride_s,
            scale,
            scale_2,
            n_keys,
            width,
            ahead,
            window,
            sinks,
            True,
            BLOCK_N,
            BLOCK_K,
            WHOLE_K,
            UPCAST,
        )
    dq_ptr += (batch * n_queries * n_heads + head) * width
    store_rows(dq_ptr, dq, first, n_queries, n_heads * width, width, BLOCK_M, BLOCK_K)


@triton.jit
def _key_gradients(
    dk,
    dv,
    k,
    v,
    keys,
    dy_ptr,  # of one batch entry
    q_ptr,
    delta_ptr,
    base_ptr,
    head,
    first,
    dy_stride_t,
    dy_stride_h,
    q_stride_t,
    q_stride_h,
    delta_stride_h,
    scale,
    scale_2,
    n_queries,
    n_keys,
    width,
    ahead,
    window,
    sinks,
    EDGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """What one block of queries of one head adds to dK and dV of a block of keys.

    The tiles are transposed, (keys, queries), as both products need them.
    """
    NARROW: tl.constexpr = q_ptr.dtype.element_ty
    head = tl.cast(head, tl.int64)
    q_ptr += head * q_stride_h
    dy_ptr += head * dy_stride_h
    q = load_rows(
        q_ptr, first, n_queries, q_stride_t, width, BLOCK_M, BLOCK_K, WHOLE_K, EDGE, UPCAST
    )
    dy = load_rows(
        dy_ptr, first, n_queries, dy_stride_t, width, BLOCK_M, BLOCK_K, WHOLE_K, EDGE, UPCAST
    )
    rows = first + tl.arange(0, BLOCK_M)
    base = tl.load(base_ptr + head * delta_stride_h + rows)
    s = tl.dot(k, tl.trans(q), input_precision="ieee")
    power = s * scale_2 - base[None, :]
    if EDGE:
        positions = rows + n_keys - n_queries
        seen = sees(positions[None, :], keys[:, None], n_keys, ahead, window, sinks)
        power = tl.where(seen, power, float("-inf"))
    p = tl.exp2(power)
    dv = tl.dot(narrowed(p, NARROW, UPCAST), dy, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
    delta = tl.load(delta_ptr + head * delta_stride_h + rows)
    ds = p * (dp * scale - delta[None, :])
    dk = tl.dot(narrowed(ds, NARROW, UPCAST), q, dk, input_precision="ieee")
    return dk, dv


@Kernel
def dk_dv_kernel(
    dy_ptr,  # (B, T, H, K) with adjacent channels, as q, k and v
    q_ptr,
    k_ptr,  # (B, S, G, K)
    v_ptr,
    delta_ptr,  # (B, H, delta_stride_h), see delta_kernel
    base_ptr,
    dk_ptr,  # (B, S, G, K) contiguous
    dv_ptr,
    dy_stride_b,
    dy_stride_t,
    dy_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_g,
    v_stride_b,
    v_stride_s,
    v_stride_g,
    delta_stride_h,
    scale,
    scale_2,  # times log2(e)
    n_queries,
    n_keys,
    n_groups,
    share,  # query heads to a kv head
    width,
    ahead,
    window,
    sinks,
    situation,  # for the tuner alone
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    blocks = tl.cdiv(n_keys, BLOCK_N)
    row_of_groups = tl.program_id(0) // blocks
    # The first keys of a causal call are seen by most queries: they start first.
    first_key = (tl.program_id(0) % blocks) * BLOCK_N
    batch = tl.cast(row_of_groups // n_groups, tl.int64)
    group = tl.cast(row_of_groups % n_groups, tl.int64)
    first_head = group * share
    dy_ptr += batch * dy_stride_b + first_head * dy_stride_h
    q_ptr += batch * q_stride_b + first_head * q_stride_h
    k_ptr += batch * k_stride_b + group * k_stride_g
    v_ptr += batch * v_stride_b + group * v_stride_g
    delta_ptr += tl.cast(row_of_groups, tl.int64) * share * delta_stride_h
    base_ptr += tl.cast(row_of_groups, tl.int64) * share * delta_stride_h

    k = load_rows(
        k_ptr, first_key, n_keys, k_stride_s, width, BLOCK_N, BLOCK_K, WHOLE_K, True, UPCAST
    )
    v = load_rows(
        v_ptr, first_key, n_keys, v_stride_s, width, BLOCK_N, BLOCK_K, WHOLE_K, True, UPCAST
    )
    keys = first_key + tl.arange(0, BLOCK_N)
    start, full_start, full_stop, stop = query_blocks(
        first_key, n_queries, n_keys, ahead, window, sinks, BLOCK_M, BLOCK_N
    )
    dk = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    # One loop over heads and blocks: its loads run ahead from one head into the next.
    n_full = full_stop - full_start
    # The first loads of a loop find their addresses before it is asked whether it has any rounds;
    # what a division by zero leads to is undefined.
    full_or_1 = tl.maximum(n_full, 1)
    for i in range(share * n_full):
        dk, dv = _key_gradients(
            dk,
            dv,
            k,
            v,
            keys,
            dy_ptr,
            q_ptr,
            delta_ptr,
            base_ptr,
            i // full_or_1,
            (full_start + i % full_or_1) * BLOCK_M,
            dy_stride_t,
            dy_stride_h,
            q_stride_t,
            q_stride_h,
            delta_stride_h,
            scale,
            scale_2,
            n_queries,
            n_keys,
            width,
            ahead,
            window,
            sinks,
            False,
            BLOCK_M,
            BLOCK_K,
            WHOLE_K,
            UPCAST,
        )
    n_edge = full_start - start + stop - full_stop
    edge_or_1 = tl.maximum(n_edge, 1)
    for i in range(share * n_edge):
        dk, dv = _key_gradients(
            dk,
            dv,
            k,
            v,
            keys,
            dy_ptr,
            q_ptr,
            delta_ptr,
            base_ptr,
            i // edge_or_1,
            edge_block(i % edge_or_1, 0, start, full_start, full_stop) * BLOCK_M,
            dy_stride_t,
            dy_stride_h,
            q_stride_t,
            q_stride_h,
            delta_stride_h,
            scale,
            scale_2,
            n_queries,
            n_keys,
            width,
            ahead,
            window,
            sinks,
            True,
            BLOCK_M,
            BLOCK_K,
            WHOLE_K,
            UPCAST,
        )
    at = (batch * n_keys * n_groups + group) * width
    store_rows(dk_ptr + at, dk, first_key, n_keys, n_groups * width, width, BLOCK_N, BLOCK_K)
    store_rows(dv_ptr + at, dv, first_key, n_keys, n_groups * width, width, BLOCK_N, BLOCK_K)
