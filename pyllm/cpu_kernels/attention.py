"""Attention in C++ (``csrc/cpu/attention.cpp``) around PyTorch's batched matrix products.

Work is cut into blocks of scores that stay in the second-level cache: some pairs (batch row, kv
head) times ``QUERY_TOKENS`` tokens, against only those keys that the block can see at all. The
query heads that share a kv head are rows of one matrix, so keys and values are never repeated, and
the gradients of a kv head come out summed. Packed copies make every product's shape a multiple of
64, because oneDNN compiles a kernel for each new shape (see :mod:`pyllm.cpu_kernels._shapes`).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyllm.cpu_kernels._launch import accumulator, dtype_code, extension, ready, unit_stride
from pyllm.cpu_kernels._shapes import rounded

PRODUCTS_BY_TORCH = True
"""Bits may change with the number of threads as those of PyTorch's products do; not in float32 and
float64 where MKL_CBWR=AUTO,STRICT is set, as pyllm's scripts do."""

QUERY_TOKENS = 128
"""Tokens of a block: fewer skip more of what the mask hides, more make larger products."""

SCRATCH_BYTES = 4 << 20
"""Scores of a block, unless one pair has more."""

_KEY_STEP = 64


class _Block(NamedTuple):
    """Tokens ``[first_token, first_token + tokens)`` against keys ``[first_key, end_key)``."""

    first_token: int
    tokens: int
    rows: int
    first_key: int
    end_key: int


class _Problem(NamedTuple):
    """The sizes of one call, and its mask."""

    batch: int
    n_tokens: int
    n_keys: int
    groups: int
    shared: int
    width: int
    scale: float
    causal: bool
    window: int
    sinks: int
    dtype: torch.dtype

    @property
    def padded_keys(self) -> int:
        return rounded(self.n_keys, self.dtype)

    def blocks(self) -> list[_Block]:
        """Blocks of queries, with the keys that one of them sees."""
        blocks = []
        for first in range(0, self.n_tokens, QUERY_TOKENS):
            tokens = min(QUERY_TOKENS, self.n_tokens - first)
            position = self.n_keys - self.n_tokens + first
            # With sinks every query sees the first key: no block lies outside of the window.
            skips = self.window and not self.sinks
            start = max(0, position - self.window + 1) if skips else 0
            stop = position + tokens if self.causal else self.n_keys
            stop = max(0, -(-stop // _KEY_STEP) * _KEY_STEP)
            blocks.append(
                _Block(
                    first,
                    tokens,
                    rounded(tokens * self.shared, self.dtype),
                    start // _KEY_STEP * _KEY_STEP,
                    min(stop, self.padded_keys),
                )
            )
        return blocks

    def pair_groups(self, blocks: list[_Block], buffers: int) -> Iterator[tuple[int, int]]:
        """First pair and number of pairs whose scores fit in the scratch together."""
        most = max(block.rows * (block.end_key - block.first_key) for block in blocks)
        pairs = self.batch * self.groups
        fits = max(1, SCRATCH_BYTES // max(1, most * self.dtype.itemsize * buffers))
        for first in range(0, pairs, fits):
            yield first, min(fits, pairs - first)


def _problem(q: Tensor, k: Tensor, scale: float, causal: bool, window: int, sinks: int) -> _Problem:
    batch, n_tokens, n_heads, width = q.shape
    groups = k.shape[2]
    return _Problem(
        batch,
        n_tokens,
        k.shape[1],
        groups,
        n_heads // groups,
        width,
        scale,
        causal,
        window,
        min(sinks, k.shape[1]) if window else 0,
        q.dtype,
    )


class _Scratch:
    """Buffers by name, each allocated once per call at the size it first needs."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Uninitialised memory of that shape."""
        size = 1
        for n in shape:
            size *= n
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = self._like.new_empty(size)
        return buffer[:size].view(shape)


def _pack(
    x: Tensor, groups: int, first_pair: int, first_token: int, tokens: int, out: Tensor
) -> Tensor:
    """Heads of some tokens to ``out`` (pairs, rows, K); the rows that remain become zeros."""
    extension().pack_heads(
        x.data_ptr(),
        x.itemsize,
        *x.stride()[:3],
        groups,
        x.shape[2] // groups,
        x.shape[3],
        first_pair,
        out.shape[0],
        first_token,
        tokens,
        out.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _unpack(
    packed: Tensor, groups: int, first_pair: int, first_token: int, tokens: int, out: Tensor
) -> None:
    """The way back, into contiguous heads ``out`` (B, T, H, K)."""
    extension().unpack_heads(
        packed.data_ptr(),
        packed.itemsize,
        groups,
        out.shape[2] // groups,
        out.shape[3],
        out.shape[1],
        first_pair,
        packed.shape[0],
        first_token,
        tokens,
        packed.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _where(problem: _Problem, first_pair: int, block: _Block, scores: Tensor) -> tuple[object, ...]:
    """The arguments that tell the softmax kernels what a block of scores stands for."""
    return (
        problem.scale,
        problem.causal,
        problem.window,
        problem.sinks,
        problem.shared,
        problem.n_tokens,
        problem.n_keys,
        first_pair,
        scores.shape[0],
        block.first_token,
        block.tokens,
        scores.shape[1],
        block.first_key,
        scores.shape[2],
        torch.get_num_threads(),
    )


def attention_forward(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """See :func:`pyllm.reference.attention.attention_forward`."""
    if q_BTHK.dtype == torch.float16:  # scores over 65,504 would overflow
        y_BTHK, lse_BHT = attention_forward(
            q_BTHK.float(), k_BSGK.float(), v_BSGK.float(), scale, causal, window, sinks
        )
        return y_BTHK.half(), lse_BHT
    code, native = dtype_code("attention", q_BTHK.dtype), extension()
    batch, n_tokens, n_heads, width = q_BTHK.shape
    lse_BHT = torch.empty(batch, n_heads, n_tokens, dtype=accumulator(q_BTHK.dtype))
    y_BTHK = q_BTHK.new_empty(q_BTHK.shape)
    if y_BTHK.numel() == 0:
        return y_BTHK, lse_BHT.fill_(float("-inf"))
    q_BTHK, k_BSGK, v_BSGK = (unit_stride(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    problem = _problem(q_BTHK, k_BSGK, scale, causal, window, sinks)
    groups, keys, padded = problem.groups, problem.n_keys, problem.padded_keys
    blocks, scratch = problem.blocks(), _Scratch(q_BTHK)
    for first, n in problem.pair_groups(blocks, buffers=1):
        k_PSK = _pack(k_BSGK, groups, first, 0, keys, scratch.take("k", n, padded, width))
        v_PSK = _pack(v_BSGK, groups, first, 0, keys, scratch.take("v", n, padded, width))
        for block in blocks:
            start, tokens, seen = block.first_token, block.tokens, slice(*block[3:])
            q_PMK = scratch.take("q", n, block.rows, width)
            _pack(q_BTHK, groups, first, start, tokens, q_PMK)
            s_PMS = scratch.take("s", n, block.rows, block.end_key - block.first_key)
            torch.bmm(q_PMK, k_PSK[:, seen].transpose(1, 2), out=s_PMS)
            where = _where(problem, first, block, s_PMS)
            native.attention_softmax(code, s_PMS.data_ptr(), lse_BHT.data_ptr(), *where)
            y_PMK = torch.bmm(s_PMS, v_PSK[:, seen], out=q_PMK)
            _unpack(y_PMK, groups, first, start, tokens, y_BTHK)
    return y_BTHK, lse_BHT


def attention_backward(
    dy_BTHK: Tensor,
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    y_BTHK: Tensor,
    lse_BHT: Tensor,
    scale: float,
    causal: bool,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`pyllm.reference.attention.attention_backward`."""
    if q_BTHK.dtype == torch.float16:
        dy, q, k, v, y = (x.float() for x in (dy_BTHK, q_BTHK, k_BSGK, v_BSGK, y_BTHK))
        dq, dk, dv = attention_backward(dy, q, k, v, y, lse_BHT, scale, causal, window, sinks)
        return dq.half(), dk.half(), dv.half()
    code, wide = dtype_code("attention", q_BTHK.dtype), accumulator(q_BTHK.dtype)
    native = extension()
    dq_BTHK = q_BTHK.new_empty(q_BTHK.shape)
    dk_BSGK, dv_BSGK = k_BSGK.new_empty(k_BSGK.shape), v_BSGK.new_empty(v_BSGK.shape)
    if q_BTHK.numel() == 0 or k_BSGK.numel() == 0:
        return dq_BTHK.zero_(), dk_BSGK.zero_(), dv_BSGK.zero_()
    q_BTHK, k_BSGK, v_BSGK = (unit_stride(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    dy_BTHK, y_BTHK = ready(dy_BTHK, q_BTHK.dtype), y_BTHK.contiguous()
    lse_BHT = ready(lse_BHT, wide)
    delta_BHT = torch.empty_like(lse_BHT)
    native.attention_delta(
        code,
        dy_BTHK.data_ptr(),
        y_BTHK.data_ptr(),
        delta_BHT.data_ptr(),
        *y_BTHK.shape,
        torch.get_num_threads(),
    )
    problem = _problem(q_BTHK, k_BSGK, scale, causal, window, sinks)
    groups, keys, padded, width = (
        problem.groups,
        problem.n_keys,
        problem.padded_keys,
        problem.width,
    )
    blocks, scratch = problem.blocks(), _Scratch(q_BTHK)
    for first, n in problem.pair_groups(blocks, buffers=2):
        k_PSK = _pack(k_BSGK, groups, first, 0, keys, scratch.take("k", n, padded, width))
        v_PSK = _pack(v_BSGK, groups, first, 0, keys, scratch.take("v", n, padded, width))
        dk_PSK = torch.zeros(n, padded, width, dtype=wide)
        dv_PSK = torch.zeros(n, padded, width, dtype=wide)
        for block in blocks:
            start, tokens, seen = block.first_token, block.tokens, slice(*block[3:])
            shape = (n, block.rows, width)
            q_PMK = _pack(q_BTHK, groups, first, start, tokens, scratch.take("q", *shape))
            dy_PMK = _pack(dy_BTHK, groups, first, start, tokens, scratch.take("dy", *shape))
            n_seen = block.end_key - block.first_key
            p_PMS = scratch.take("s", n, block.rows, n_seen)
            ds_PMS = scratch.take("dp", n, block.rows, n_seen)
            torch.bmm(q_PMK, k_PSK[:, seen].transpose(1, 2), out=p_PMS)
            torch.bmm(dy_PMK, v_PSK[:, seen].transpose(1, 2), out=ds_PMS)
            native.attention_softmax_gradient(
                code,
                p_PMS.data_ptr(),
                ds_PMS.data_ptr(),
                lse_BHT.data_ptr(),
                delta_BHT.data_ptr(),
                *_where(problem, first, block, p_PMS),
            )
            part_PSK = scratch.take("part", n, n_seen, width)
            dv_PSK[:, seen] += torch.bmm(p_PMS.transpose(1, 2), dy_PMK, out=part_PSK)
            dk_PSK[:, seen] += torch.bmm(ds_PMS.transpose(1, 2), q_PMK, out=part_PSK)
            dq_PMK = torch.bmm(ds_PMS, k_PSK[:, seen], out=dy_PMK)
            _unpack(dq_PMK, groups, first, start, tokens, dq_BTHK)
        _unpack(dk_PSK.to(k_BSGK.dtype), groups, first, 0, keys, dk_BSGK)
        _unpack(dv_PSK.to(v_BSGK.dtype), groups, first, 0, keys, dv_BSGK)
    return dq_BTHK, dk_BSGK, dv_BSGK
