"""The blocks that Triton's attention visits, in its interpreter: edges of windows, what is skipped.

The blocks are small here, so that a few tokens lie in several; their order and their bounds are the
ones that a card sees.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from pyllm.ops._registry import face_module
from pyllm.reference import attention as reference
from pyllm.testing.budget import compare

pytest.importorskip("triton", reason="triton is not installed")
from pyllm.triton_kernels._attention_choices import choices

triton_face = face_module("attention", "triton")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is not on where there is a card"
)

WINDOW = 16
SIGHTS = [
    # queries, keys, causal, window, sinks
    *((n, n, True, WINDOW, 0) for n in (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 70)),
    *((70, 70, True, window, 0) for window in (1, WINDOW - 1, WINDOW + 1, 2 * WINDOW, 69, 70)),
    (70, 70, True, 17, 5),
    (70, 70, True, 1, 33),
    (40, 97, True, 0, 0),
    (40, 97, True, 20, 3),
    (33, 70, False, 20, 3),
    (50, 70, False, 0, 0),
    (40, 20, True, 3, 0),
    (1, 70, True, 30, 2),
]


@pytest.fixture(params=[(32, 16), (16, 32)], ids=["32x16", "16x32"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    queries, keys = request.param
    monkeypatch.setitem(triton_face.INTERPRETED_BLOCKS, "BLOCK_M", queries)
    monkeypatch.setitem(triton_face.INTERPRETED_BLOCKS, "BLOCK_N", keys)
    return request.param


def _tensors(
    n_queries: int, n_keys: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n_queries)
    q, dy = (torch.randn(1, n_queries, 2, 8, generator=draw).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, n_keys, 1, 8, generator=draw).to(dtype) for _ in range(2))
    return q, k, v, dy


def _all(face: object, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, *sight: object) -> list[Tensor]:
    y, lse = face.attention_forward(q, k, v, *sight)
    return [y, lse, *face.attention_backward(dy, q, k, v, y, lse, *sight)]


@pytest.mark.parametrize("sight", SIGHTS, ids=str)
def test_edges(blocks: tuple[int, int], sight: tuple[int, int, bool, int, int]) -> None:
    n_queries, n_keys, *rest = sight
    q, k, v, dy = _tensors(n_queries, n_keys)
    got = _all(triton_face, q, k, v, dy, 0.5, *rest)
    plain = _all(reference, q, k, v, dy, 0.5, *rest)
    truth = _all(reference, *(x.double() for x in (q, k, v, dy)), 0.5, *rest)
    names = ("y", "lse", "dq", "dk", "dv")
    for name, *three in zip(names, got, plain, truth, strict=True):
        compare(name, *three, torch.float32, gradient=name.startswith("d"), degenerate=rest[1] == 1)


def test_what_is_out_of_sight_is_not_read(blocks: tuple[int, int]) -> None:
    """A NaN there would reach everything: zero times NaN is NaN."""
    q, k, v, dy = _tensors(32, 128)
    k[:, :64] = v[:, :64] = float("nan")  # the window ends at key 96 - 31
    y, lse, dq, dk, dv = _all(triton_face, q, k, v, dy, 0.5, True, 32, 0)
    for tensor in (y, lse, dq, dk[:, 64:], dv[:, 64:]):
        assert tensor.isfinite().all()
    assert not dv[:, :64].any()
    # Sinks stay in sight, and what lies between them and the window is skipped.
    k[:, :32] = v[:, :32] = 1.0
    assert _all(triton_face, q, k, v, dy, 0.5, True, 32, 3)[0].isfinite().all()


def test_queries_out_of_sight_are_not_read(blocks: tuple[int, int]) -> None:
    q, k, v, dy = _tensors(128, 128)
    y, lse = triton_face.attention_forward(q, k, v, 0.5, True, 32, 0)
    dy[:, 64:] = float("nan")
    _, dk, dv = triton_face.attention_backward(dy, q, k, v, y, lse, 0.5, True, 32, 0)
    assert dk[:, :32].isfinite().all()
    assert dv[:, :32].isfinite().all()
    assert dv[:, 64:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_over_several_blocks(blocks: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v, dy = _tensors(70, 80, dtype)
    got = _all(triton_face, q, k, v, dy, 0.5, True, 40, 2)
    plain = _all(reference, q, k, v, dy, 0.5, True, 40, 2)
    truth = _all(reference, *(x.double() for x in (q, k, v, dy)), 0.5, True, 40, 2)
    for name, *three in zip(("y", "lse", "dq", "dk", "dv"), got, plain, truth, strict=True):
        compare(name, *three, dtype, gradient=name.startswith("d"))


@pytest.mark.parametrize("kernel", ["dq_kernel", "dk_dv_kernel"])
def test_blocks_of_queries_divide_a_whole_one(kernel: str) -> None:
    """Up to there the sums of the backward are padded, and read without a mask."""
    for width, whole, wide in product((16, 32, 64, 128, 256), (True, False), (True, False)):
        for choice in choices(kernel, width, whole, wide):
            assert triton_face.WHOLE_BLOCKS % choice.block_m == 0
    assert triton_face.WHOLE_BLOCKS % triton_face.DELTA_ROWS == 0


def test_rows_too_far_apart_for_32_bits_within_a_tile_are_copied() -> None:
    """On the meta device: the interpreter would touch every byte of the memory between them."""
    for stride in (2**22, 2**23, 2**30):
        far = torch.empty(2 * stride + 8, device="meta").as_strided((1, 3, 1, 8), (0, stride, 8, 1))
        assert (triton_face._adjacent(far) is far) == (stride < triton_face.LARGEST_STRIDE)
    assert triton_face._adjacent(far).is_contiguous()


@pytest.mark.parametrize("sizes", [(0, 3, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_nothing_to_do(sizes: tuple[int, int, int]) -> None:
    batch, n_queries, n_keys = sizes
    q, k = torch.randn(batch, n_queries, 2, 8), torch.randn(batch, n_keys, 1, 8)
    got = _all(triton_face, q, k, k, q, 0.5, False, 0, 0)
    expected = _all(reference, q, k, k, q, 0.5, False, 0, 0)
    for have, want in zip(got, expected, strict=True):
        assert torch.equal(have, want)
