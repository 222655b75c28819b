"""The C++ face of attention: every instruction set, any number of threads, what it skips."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyllm._native import cpu_extension
from pyllm.testing import OPERATIONS, check_face

if cpu_extension() is None:
    pytest.skip("pyllm._cpu is not built", allow_module_level=True)

from pyllm.cpu_kernels import attention as face
from pyllm.cpu_kernels.attention import attention_backward, attention_forward

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ATTENTION = OPERATIONS["attention"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for case in (*ATTENTION.smoke_cases, *map(ATTENTION.case, ATTENTION.extra)):
        check_face(case, face, dtype)


def _run(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int, sinks: int
) -> list[Tensor]:
    mask = (0.2, causal, window, sinks)
    y, lse = attention_forward(q, k, v, *mask)
    return [y, lse, *attention_backward(dy, q, k, v, y, lse, *mask)]


def _draw(
    batch: int, tokens: int, past: int, groups: int, shared: int, width: int, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, groups * shared)] * 2 + [(tokens + past, groups)] * 2
    return [torch.randn(batch, *s, width, generator=generator).to(dtype) for s in shapes]


# One lane of keys for a pair and several, one chunk in a lane and several, rows in whole blocks and
# not.
SHAPES = [(1, 192, 0, 1, 1, 64), (2, 50, 1250, 4, 1, 16), (1, 131, 7, 2, 3, 33)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_on_any_number_of_threads(
    isa: str,
    shape: tuple[int, ...],
    window: int,
    dtype: torch.dtype,
    set_threads: Callable[[int], None],
) -> None:
    tensors = _draw(*shape, dtype)
    results = []
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        results.append(_run(*tensors, True, window, 3 if window else 0))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    assert all(tensor.std() > 1e-4 for tensor in results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_that_no_query_sees_are_not_read(isa: str, dtype: torch.dtype) -> None:
    """A NaN in keys and values far from a query's window and sinks reaches nothing of it."""
    dy, q, k, v = _draw(1, 400, 400, 2, 2, 64, dtype)
    before = _run(dy, q, k, v, True, 64, 2)
    k[:, 200:300] = v[:, 200:300] = float("nan")
    after = _run(dy, q, k, v, True, 64, 2)
    assert all(one.isfinite().all() for one in after[:3])
    assert all(torch.equal(one, two) for one, two in zip(before[:3], after[:3], strict=True))
    assert not after[3][:, 200:300].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_stays_in_its_row(isa: str, dtype: torch.dtype) -> None:
    tensors = _draw(1, 70, 0, 1, 2, 16, dtype)
    before = _run(*tensors, True, 0, 0)
    tensors[1][0, 40, 1] = float("nan")
    y, lse, dq, dk, dv = _run(*tensors, True, 0, 0)
    for got, sound in ((y, before[0]), (dq, before[2])):
        assert not got[0, 40, 1].isfinite().any()
        got[0, 40, 1] = sound[0, 40, 1] = 0
        assert torch.equal(got, sound)
    assert lse.isnan().sum() == 1
    # Later keys are not seen by that query, though some of them lie in a tile with those that are.
    for got in (dk, dv):
        assert not got[0, :41].isfinite().any()
        assert got[0, 48:].isfinite().all()
