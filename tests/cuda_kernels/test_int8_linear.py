"""Every way that ``int8_linear`` has on a card: __dp4a or tensor cores, one launch or two.

On the CPU, or on a card where there is one (`pytest -m gpu`).
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pyllm._native import cuda_extension, cuda_on_cpu
from pyllm.ops import int8_linear
from pyllm.ops._registry import face_module
from pyllm.testing import OpCase, check_face
from pyllm.testing.cases.int8_linear import INT8_LINEAR

DEVICE = "cpu" if cuda_on_cpu() else "cuda"
on_cpu = pytest.mark.skipif(not cuda_on_cpu(), reason="the CUDA kernels here are not the CPU's")
pytestmark = [pytest.mark.skipif(cuda_extension() is None, reason="pyllm._cuda is not built")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FACE = face_module("int8_linear", "cuda")
# Several ways serve one row, and more than eight.
CASES = [case for case in INT8_LINEAR.hostile_cases if case.sizes["N"] not in (0, *range(2, 9))]

# Rows, width, outputs: one tile and several, small ones and large, less than a step of 64 and more
# steps than are ahead, one output and pairs. The widths are those that tensor cores serve.
SIZES = [
    (9, 16, 1),
    (16, 48, 7),
    (33, 64, 65),
    (64, 80, 64),
    (70, 336, 66),
    (129, 144, 9),
    (140, 272, 131),
]
# More outputs than there are warps, part of a round of loads, one and a half, and exactly one.
ONE_ROW = [(1, 16, 3), (1, 1296, 77), (1, 6144, 9), (1, 4096, 70)]


@pytest.fixture
def old_way(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a card before sm_80 does, and a row that is too wide for one launch."""
    monkeypatch.setattr(FACE, "TENSOR_CORES", False)
    monkeypatch.setattr(FACE, "LARGEST_ROW", -1)
    yield


def _whole_numbers(rows: int, width: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose products and sums are exact in whatever order they are added."""
    draw = torch.Generator().manual_seed(rows * width + outputs)
    x = torch.randint(-15, 16, (rows, width), generator=draw).double()
    x[:, 0] = 127  # so that the scale of each row is one
    weight = torch.randint(-128, 128, (outputs, width), generator=draw)
    scale = 2.0 ** torch.randint(-12, -9, (outputs,), generator=draw)
    return x.to(DEVICE), weight.to(DEVICE, torch.int8), scale.to(DEVICE, torch.double)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_old_ways_are_right_too(old_way: None, case: OpCase, dtype: torch.dtype) -> None:
    check_face(case, FACE, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize_input", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_no_number_is_in_a_wrong_place(
    sizes: tuple[int, int, int], quantize_input: bool, dtype: torch.dtype
) -> None:
    x, weight, scale = _whole_numbers(*sizes)
    y = int8_linear(x.to(dtype), weight, scale, quantize_input=quantize_input, face="cuda")
    assert torch.equal(y, ((x @ weight.double().T) * scale).to(dtype))


@pytest.mark.parametrize("quantize_input", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tensor_cores_keep_the_error_budget(
    sizes: tuple[int, int, int], quantize_input: bool
) -> None:
    rows, width, outputs = sizes
    case = INT8_LINEAR.case(
        {"N": rows, "D": width, "F": outputs, "edge": "none", "quantize": quantize_input}
    )
    for dtype in (torch.float16, torch.bfloat16):
        check_face(case, FACE, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*ONE_ROW, *SIZES], ids=str)
def test_all_ways_give_the_same_bits(
    sizes: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of integers."""
    rows, width, outputs = sizes
    case = INT8_LINEAR.case({"N": rows, "D": width, "F": outputs, "edge": "none", "quantize": True})
    inputs = list(case.make_inputs(dtype, DEVICE).values())
    y = FACE.int8_linear_forward(*inputs)
    monkeypatch.setattr(FACE, "TENSOR_CORES", False)
    monkeypatch.setattr(FACE, "LARGEST_ROW", -1)
    assert torch.equal(y, FACE.int8_linear_forward(*inputs))
    assert torch.equal(y, face_module("int8_linear", "reference").int8_linear_forward(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_every_weight_is_converted(rows: int, dtype: torch.dtype) -> None:
    """Integers become floats by their bits."""
    weight = torch.arange(-128, 128, device=DEVICE).to(torch.int8).view(16, 16).T.contiguous()
    x = torch.zeros(rows, 16, dtype=dtype, device=DEVICE)
    for row in range(rows):
        x[row, row % 16] = 1 + row // 16
    y = int8_linear(x, weight, torch.ones(16, device=DEVICE), quantize_input=False, face="cuda")
    assert torch.equal(y, (x.double() @ weight.double().T).to(dtype))


@on_cpu
@pytest.mark.parametrize("quantize_input", [True, False])
def test_the_order_of_threads_changes_nothing(quantize_input: bool) -> None:
    """With a barrier too few between the copies and the products, it would."""
    for rows, width, outputs in ((1, 4352, 70), (40, 336, 40), (140, 272, 20)):
        x, weight, scale = _whole_numbers(rows, width, outputs)
        x = x.half()
        expected = ((x.double() @ weight.double().T) * scale).half()
        for order in (0, 1, 2, 3):
            cuda_extension().set_order(order)
            try:
                y = int8_linear(x, weight, scale, quantize_input=quantize_input, face="cuda")
            finally:
                cuda_extension().set_order(0)
            assert torch.equal(y, expected), (rows, order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("launches", [1, 2])
def test_the_largest_of_a_row_may_be_anywhere(
    launches: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread has a part in the scale."""
    if launches == 2:
        monkeypatch.setattr(FACE, "LARGEST_ROW", -1)
    width, outputs = 8192, 9
    weight = torch.full((outputs, width), 3, dtype=torch.int8, device=DEVICE)
    scale = torch.full((outputs,), 2.0**-12, device=DEVICE)
    total = (width + 126) * 3 * 2.0**-12
    expected = torch.full((1, outputs), total, dtype=dtype, device=DEVICE)
    for at in range(0, width, 264):  # another warp every time, whatever each of them reads at once
        x = torch.ones(1, width, dtype=dtype, device=DEVICE)
        x[0, at] = 127
        y = int8_linear(x, weight, scale, face="cuda")
        assert torch.equal(y, expected), at


@pytest.mark.parametrize("quantize_input", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float, quantize_input: bool) -> None:
    x = torch.ones(40, 80, dtype=torch.half, device=DEVICE)
    weight = torch.ones(33, 80, dtype=torch.int8, device=DEVICE)
    x[38, 79] = value
    y = int8_linear(
        x, weight, torch.ones(33, device=DEVICE), quantize_input=quantize_input, face="cuda"
    )
    assert y.isfinite().all(1).tolist() == [row != 38 for row in range(40)]


def test_what_one_launch_does_not_serve() -> None:
    with pytest.raises(ValueError, match="int8_one_row: a row of 24 numbers, or a misaligned one"):
        cuda_extension().int8_one_row(0, 16, 16, 16, 16, 4, 24, 0)


def test_rows_that_an_int_does_not_count() -> None:
    with pytest.raises(ValueError, match="rows of 1073741825 numbers are too wide; split the call"):
        cuda_extension().int8_weights(0, 16, 16, 16, 16, 1, 4, 2**30 + 1, True, 0)
