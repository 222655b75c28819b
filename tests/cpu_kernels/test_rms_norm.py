"""What only the C++ face promises: the same bits on any number of threads, exact conversions."""

from collections.abc import Callable

import pytest
import torch

from pyllm._native import cpu_extension
from pyllm.reference import rms_norm as reference

if cpu_extension() is None:
    pytest.skip("pyllm._cpu is not built", allow_module_level=True)

from pyllm.cpu_kernels.rms_norm import rms_norm_backward, rms_norm_forward

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(width, generator=generator, dtype=torch.float64)
    dy = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), weight.to(dtype), dy.to(dtype)


def relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    error, size = (given.double() - expected).norm().item(), expected.norm().item()
    return error / size if size else error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width"), [(0, 8), (1, 1), (2, 31), (7, 33), (17, 97), (65, 511), (513, 100)]
)
def test_agrees_with_the_formula_in_float64(
    isa: str, rows: int, width: int, dtype: torch.dtype
) -> None:
    x, weight, dy = inputs(rows, width, dtype)
    y, rstd = rms_norm_forward(x, weight, 1e-5)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd)
    y_true, rstd_true = reference.rms_norm_forward(x.double(), weight.double(), 1e-5)
    dx_true, dweight_true = reference.rms_norm_backward(
        dy.double(), x.double(), weight.double(), rstd_true
    )
    eps = torch.finfo(dtype).eps
    assert y.dtype == dx.dtype == dweight.dtype == dtype
    assert rstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(y, y_true) <= 2 * eps
    assert relative(rstd, rstd_true) <= 4 * torch.finfo(rstd.dtype).eps
    if width > 1:  # with one column dx is a difference of equal terms, that is rounding only
        assert relative(dx, dx_true) <= 4 * eps
    assert relative(dweight, dweight_true) <= 8 * eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(
    isa: str, dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    x, weight, dy = inputs(1500, 129, dtype)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        y, rstd = rms_norm_forward(x, weight, 1e-5)
        results.append((y, rstd, *rms_norm_backward(dy, x, weight, rstd)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def every_float(count: int) -> torch.Tensor:
    """Random bit patterns, and all around what bf16 and fp16 round, overflow or lose."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), generator=generator)
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    near = halves.view(torch.int32).long()[:, None] + torch.tensor(
        [-4097, -4096, -1, 1, 4096, 4097]
    )
    near = near.flatten()[(near.flatten() >= -(2**31)) & (near.flatten() < 2**31)]
    every = torch.cat([bits, near, halves.view(torch.int32).long()]).to(torch.int32)
    return every.view(torch.float32)


def same_or_both_nan(one: torch.Tensor, two: torch.Tensor) -> bool:
    width = torch.int16 if one.element_size() == 2 else torch.int32
    nan = one.isnan() & two.isnan()
    return bool(((one.view(width) == two.view(width)) | nan).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rounds_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    """With rows of ones and eps 0, y is the float32 weight rounded to the dtype."""
    weight = every_float(200_000)
    y, rstd = rms_norm_forward(torch.ones(1, len(weight), dtype=dtype), weight, 0.0)
    assert rstd.item() == 1
    assert same_or_both_nan(y[0], weight.to(dtype))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_widens_exactly(isa: str, dtype: torch.dtype) -> None:
    """With one row of ones and rstd 1, the float32 dweight is dy itself: all 65,536 of them."""
    dy = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    ones = torch.ones_like(dy)
    _, dweight = rms_norm_backward(dy, ones, torch.ones(2**16), torch.ones(1))
    # The sum starts at +0, and +0 + -0 is +0.
    assert same_or_both_nan(dweight, dy[0].float() + 0.0)


def test_nan_and_inf_stay_in_their_rows(isa: str) -> None:
    x, weight, dy = inputs(9, 65, torch.float32)
    x[2, 3], x[5, 60] = float("nan"), float("inf")
    y, rstd = rms_norm_forward(x, weight, 1e-5)
    dx, _ = rms_norm_backward(dy, x, weight, rstd)
    clean = [row for row in range(9) if row not in (2, 5)]
    assert y[2].isnan().all() and dx[2].isnan().all()
    assert y[5, 60].isnan() and (y[5, :60] == 0).all()
    assert y[clean].isfinite().all() and dx[clean].isfinite().all()


def test_strided_and_expanded_inputs(isa: str) -> None:
    x, weight, dy = inputs(6, 40, torch.float32)
    wide = torch.randn(40, 6)
    y, rstd = rms_norm_forward(wide.t(), weight, 1e-5)
    assert torch.equal(y, rms_norm_forward(wide.t().contiguous(), weight, 1e-5)[0])
    expanded = torch.tensor(0.5).expand(6, 40)
    dx, dweight = rms_norm_backward(expanded, wide.t(), weight, rstd)
    again = rms_norm_backward(torch.full((6, 40), 0.5), wide.t().contiguous(), weight, rstd)
    assert torch.equal(dx, again[0]) and torch.equal(dweight, again[1])


def test_a_dtype_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="rms_norm: the cpu face has no torch.int32"):
        rms_norm_forward(torch.ones(2, 2, dtype=torch.int32), torch.ones(2), 1e-5)
