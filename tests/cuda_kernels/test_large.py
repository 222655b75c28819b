"""The CUDA kernels on the CPU, on tensors of more than 2^31 numbers.

Their memory is asked for and hardly touched, and of each launch only the last blocks run, whose
rows are compared with those of a small call.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pyllm._native import cuda_extension, cuda_on_cpu
from pyllm.cuda_kernels._launch import dtype_code, launch
from pyllm.ops._registry import face_module

pytestmark = pytest.mark.skipif(not cuda_on_cpu(), reason="the CUDA kernels here are not the CPU's")

LARGE = 2**31


@pytest.fixture
def last_blocks() -> Iterator[Callable[[int], None]]:
    """Calls with 0 bring back all blocks."""
    yield cuda_extension().set_last_blocks
    cuda_extension().set_last_blocks(0)


def _large(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros, or what was there before: nothing but the last rows counts."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"this machine does not give out so much address space: {error}")


def _launch(kernel: str, *arguments: object) -> None:
    """A kernel for float16, which is what all of these are stored in."""
    launch(kernel, dtype_code(kernel, torch.float16), *arguments)


def _with_end(shape: tuple[int, ...], rows: int) -> tuple[Tensor, Tensor]:
    """A large tensor, and random numbers, which its last rows are."""
    end = torch.randn(rows, *shape[1:]).half()
    large = _large(*shape)
    assert large.numel() > LARGE
    large[-rows:] = end
    return large, end


def test_rms_norm(last_blocks) -> None:
    face, weight = face_module("rms_norm", "cuda"), torch.randn(2048)
    x, end = _with_end((2**20 + 3, 2048), 2)
    last_blocks(2)
    y, rstd = face.rms_norm_forward(x, weight, 1e-5)
    last_blocks(0)
    expected, rstd_of_end = face.rms_norm_forward(end, weight, 1e-5)
    assert torch.equal(y[-2:], expected) and torch.equal(rstd[-2:], rstd_of_end)


def test_rms_norm_backward(last_blocks) -> None:
    width, weight = 2**21 + 8, torch.randn(1).expand(2**21 + 8)
    (x, end), (dy, dy_end) = (_with_end((1025, width), 1) for _ in range(2))
    rstd = torch.rand(1025)
    last_blocks(1)
    dx, _ = face_module("rms_norm", "cuda").rms_norm_backward(dy, x, weight, rstd)
    reference = face_module("rms_norm", "reference")
    expected, _ = reference.rms_norm_backward(dy_end, end, weight, rstd[-1:])
    torch.testing.assert_close(dx[-1:], expected)


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_rope(stage: str, last_blocks) -> None:
    turn = getattr(face_module("rope", "cuda"), f"rope_{stage}")
    tables = torch.randn(1, 64), torch.randn(1, 64)
    x, end = _with_end((2**24 + 3, 1, 1, 128), 2)
    last_blocks(1)
    y = turn(x, *tables)
    last_blocks(0)
    assert torch.equal(y[-2:], turn(end, *tables))


@pytest.mark.parametrize("int8", [False, True])
def test_kv_append(int8: bool) -> None:
    """A cache of so many slots, and new rows so far from each other."""
    append, slots = face_module("kv_append", "cuda").kv_append_forward, 2**24 + 5
    dtype = torch.int8 if int8 else torch.float16
    caches = [_large(1, slots, 1, 128, dtype=dtype) for _ in range(2)]
    k, v = torch.randn(2, 1, 2, 1, 128).half()
    scales = [_large(1, slots, 1, dtype=torch.float32) for _ in range(2)] if int8 else [None] * 2
    at, count = torch.tensor([slots - 2]), torch.tensor([2])
    append(*caches, k, v, at, count, 0, False, *scales)
    small = [torch.zeros(1, 2, 1, 128, dtype=dtype) for _ in range(2)]
    small_scales = [torch.zeros(1, 2, 1) for _ in range(2)] if int8 else [None] * 2
    append(*small, k, v, torch.tensor([0]), count, 0, False, *small_scales)
    for have, want in zip([*caches, *scales], [*small, *small_scales], strict=True):
        assert want is None or torch.equal(have[:, -2:], want)

    far = _large(LARGE + 512).as_strided((2, 2, 1, 128), (LARGE + 8, 128, 128, 1))
    far.copy_(torch.randn(2, 2, 1, 128))
    held, expected = (torch.zeros(2, 2, 2, 1, 128, dtype=dtype) for _ in range(2))
    for into, new in ((held, far), (expected, far.clone())):
        of_rows = torch.zeros(2, 2, 2, 1) if int8 else [None] * 2
        at = torch.tensor([0, 0]), torch.tensor([2, 2])
        append(*into, new, new, *at, 0, False, *of_rows)
    assert torch.equal(held, expected)


def test_moe_dispatch(last_blocks) -> None:
    x, end = _with_end((2**24 + 3, 128), 2)
    rows, order = _large(*x.shape), _large(len(x), dtype=torch.int32)
    order[-2:] = torch.tensor([len(x) - 1, len(x) - 2])
    last_blocks(1)
    n_valid = torch.tensor(len(x), dtype=torch.int32)
    _launch("moe_dispatch_gather", x, order, n_valid, rows, len(x), 1, 128)
    assert torch.equal(rows[-2:], end.flip(0))


def test_moe_combine(last_blocks) -> None:
    face = face_module("moe_combine", "cuda")
    rows, end = _with_end((2**24 + 4, 128), 4)
    n_tokens = len(rows) // 2
    position = _large(n_tokens, 2, dtype=torch.int32)
    position[-2:] = len(rows) - 4 + torch.tensor([[3, 0], [1, 2]])
    of_end = position[-2:] - (len(rows) - 4)
    weights, dy = _large(n_tokens, 2, dtype=torch.float32), _large(n_tokens, 128)
    weights[-2:], dy[-2:] = torch.rand(2, 2), torch.randn(2, 128)
    last_blocks(1)
    y = face.moe_combine_forward(rows, weights, position)
    drows, dweights = face.moe_combine_backward(dy, rows, weights, position)
    last_blocks(0)
    assert torch.equal(y[-2:], face.moe_combine_forward(end, weights[-2:], of_end))
    expected = face.moe_combine_backward(dy[-2:], end, weights[-2:], of_end)
    assert torch.equal(drows[-4:], expected[0]) and torch.equal(dweights[-2:], expected[1])


WIDTH, HIDDEN, EXPERTS = 128, 264, 65_535
"""Of matrices of more than 2^31 numbers; the backward has a block's row in the grid for each."""


def _experts() -> tuple[Tensor, ...]:
    """w_in and w_out, and the matrices of their last expert, in float32."""
    w_in, in_end = _with_end((EXPERTS, HIDDEN, WIDTH), 1)
    w_out, out_end = _with_end((EXPERTS, WIDTH, HIDDEN), 1)
    return w_in, w_out, in_end[0].float() / 8, out_end[0].float()


def _gelu(pre: Tensor) -> Tensor:
    return torch.nn.functional.gelu(pre, approximate="tanh")


def test_moe_ffn_of_few_tokens() -> None:
    forward = face_module("moe_ffn", "cuda").moe_ffn_forward
    w_in, w_out, in_end, out_end = _experts()
    x, experts = torch.randn(2, WIDTH).half() / 8, torch.tensor([[EXPERTS - 1]] * 2)
    y, pre, *_ = forward(x, w_in, w_out, torch.ones(2, 1), experts, "gelu")
    expected = 8 * x.float() @ in_end.T
    torch.testing.assert_close(pre.float(), expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(y.float(), _gelu(expected) @ out_end.T, rtol=1e-2, atol=1e-1)


def _of_last_expert(n_rows: int) -> tuple[Tensor, Tensor]:
    """Where the experts' rows begin, and the one tile: the last expert has the last three rows."""
    offsets = torch.full((EXPERTS + 1,), n_rows - 3, dtype=torch.int32)
    offsets[-1] = n_rows
    return offsets, torch.tensor([[EXPERTS - 1, n_rows - 3]], dtype=torch.int32)


def test_moe_ffn(last_blocks) -> None:
    """The last three of the sorted rows, by the last expert, of the last tokens."""
    w_in, w_out, in_end, out_end = _experts()
    x, end = _with_end((2**24 + 3, WIDTH), 3)
    n_rows = len(x)
    order = _large(n_rows, dtype=torch.int32)
    order[-3:] = torch.arange(n_rows - 3, n_rows).flip(0)
    pre, h, y = _large(n_rows, HIDDEN), _large(n_rows, HIDDEN), _large(n_rows, WIDTH)
    sizes = (n_rows, 1, EXPERTS, WIDTH, HIDDEN, False, 1)
    x[-3:] = end / 8
    routing = (order, *_of_last_expert(n_rows))
    _launch("moe_ffn_forward", x, w_in, w_out, *routing, pre, h, y, *sizes)
    expected = 8 * (end / 8).float().flip(0) @ in_end.T
    torch.testing.assert_close(pre[-3:].float(), expected, rtol=1e-2, atol=2e-2)
    want = h[-3:].float() @ out_end.T
    torch.testing.assert_close(y[-3:].float(), want, rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(h[-3:].float(), _gelu(pre[-3:].float()), rtol=1e-2, atol=1e-2)


def test_moe_ffn_backward(last_blocks) -> None:
    w_in, w_out, in_end, out_end = _experts()
    (x, x_end), (dy, dy_end) = (_with_end((2**24 + 3, WIDTH), 3) for _ in range(2))
    order = torch.arange(len(x) - 3, len(x), dtype=torch.int32)
    position = torch.arange(3, dtype=torch.int32)
    weights = _large(len(x), dtype=torch.float32)
    weights[-3:] = 1
    pre, partials = torch.randn(3, HIDDEN).half(), torch.empty(3, 3)
    dpre, h, dx = torch.empty(3, HIDDEN).half(), torch.empty(3, HIDDEN).half(), torch.empty(3, 128)
    dx, dweights = dx.half(), torch.empty(3)
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
    last_blocks(6)  # the tiles of the last expert's matrices
    given = (dy, x, w_in, w_out, weights, pre, order, position, *_of_last_expert(3))
    scratch = (dpre, h, partials, dx, dw_in, dw_out, dweights)
    _launch("moe_ffn_backward", *given, *scratch, 3, 1, EXPERTS, 128, HIDDEN, False, 1)

    wide = pre.float().requires_grad_()
    hidden = _gelu(wide)
    dh = dy_end.float() @ out_end
    hidden.backward(dh)
    near = {"rtol": 1e-2, "atol": 1e-1}
    torch.testing.assert_close(dpre.float(), wide.grad, **near)
    torch.testing.assert_close(dx.float(), 8 * dpre.float() @ in_end, **near)
    torch.testing.assert_close(dw_in[-1].float(), dpre.float().T @ x_end.float(), **near)
    torch.testing.assert_close(dw_out[-1].float(), dy_end.float().T @ h.float(), **near)
    torch.testing.assert_close(dweights, (dh * hidden.detach()).sum(-1), rtol=1e-2, atol=1.0)


def test_attention(last_blocks) -> None:
    """Of the last row of the batch, which has two tiles of 65 queries in each of four heads."""
    face, batch = face_module("attention", "cuda"), 65_535
    (q, q_end), (k, k_end), (v, v_end), (dy, dy_end) = (
        _with_end((batch, 65, 4, 128), 1) for _ in range(4)
    )
    mask = (0.1, True, 0, 0)
    last_blocks(8)
    y, lse = face.attention_forward(q, k, v, *mask)
    last_blocks(33)  # the last eight rows of each: delta = rowsum(dy * y)
    dq, dk, dv = face.attention_backward(dy, q, k, v, y, lse, *mask)
    last_blocks(0)
    y_end, lse_end = face.attention_forward(q_end, k_end, v_end, *mask)
    expected = face.attention_backward(dy_end, q_end, k_end, v_end, y_end, lse_end, *mask)
    assert torch.equal(y[-1:], y_end) and torch.equal(lse[-1:], lse_end)
    for have, want in zip((dq, dk, dv), expected, strict=True):
        assert torch.equal(have[-1:], want)


@pytest.mark.parametrize("rows", ["x", "weight"])
def test_linear_cross_entropy(rows: str, last_blocks) -> None:
    """The last tile of words, or of rows, in the forward, and in the gradient of the logits."""
    large, end = _with_end((2**21 + 3, 1024), 3)
    large[-128:-3] = 0
    small = torch.randn(3, 1024).half() / 32
    x, weight = (large, small) if rows == "x" else (small, large)
    (n_rows, _), n_words = x.shape, len(weight)
    targets, picked = _large(n_rows, dtype=torch.int64), _large(n_rows, dtype=torch.float32)
    loss, lse = (_large(n_rows, dtype=torch.float32) for _ in range(2))
    targets[-3:] = n_words - 1 - torch.arange(3)
    partials = torch.zeros(-(-n_words // 128), 2, n_rows)
    last_blocks(1)
    given = (x, weight, targets, loss, lse, partials, picked, -100, n_rows, n_words, 1024)
    _launch("linear_cross_entropy_forward", *given)
    x_end, weight_end = (end, small) if rows == "x" else (small, end)
    logits = x_end.float() @ weight_end.float().T
    torch.testing.assert_close(picked[-3:], logits.flip(1).diag())
    if rows == "x":
        torch.testing.assert_close(lse[-3:], logits.logsumexp(-1))
        torch.testing.assert_close(loss[-3:], lse[-3:] - picked[-3:])

    first, dloss = n_words - 3, torch.ones(n_rows)
    lse[-3:] = logits.logsumexp(-1)
    dlogits = _large(n_rows, 3)
    given = (dloss, x, weight, targets, lse, dlogits, -100, n_rows, 1024, first, n_words)
    _launch("linear_cross_entropy_backward", *given)
    expected = logits.softmax(-1) - torch.eye(3).flip(1)
    torch.testing.assert_close(dlogits[-3:].float(), expected, rtol=1e-3, atol=1e-3)


def test_route_topk_backward(last_blocks) -> None:
    """Rows so long that the last one begins behind 2^31."""
    n_rows, n_experts = 1025, 2**21
    logits, end = _with_end((n_rows, n_experts), 1)
    dweights, weights = torch.randn(n_rows, 2), torch.rand(n_rows, 2)
    experts = torch.tensor([[5, n_experts - 1]] * n_rows, dtype=torch.int32)
    losses = torch.zeros(2)
    counts = torch.zeros(n_experts, dtype=torch.int32)
    backward = face_module("route_topk", "cuda").route_topk_backward
    last_blocks(1)
    dlogits = backward(dweights, *losses, logits, weights, experts, counts)
    last_blocks(0)
    rows = (dweights[-1:], *losses, end, weights[-1:], experts[-1:], counts)
    assert torch.equal(dlogits[-1:], backward(*rows))
