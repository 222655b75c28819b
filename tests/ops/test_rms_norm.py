"""``rms_norm``: every face and the door, by its declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import available_faces, rms_norm
from pyllm.ops._registry import face_module
from pyllm.testing.cases.rms_norm import RMS_NORM
from pyllm.testing.suite import OperationSuite, faces_on


class TestRmsNorm(OperationSuite):
    operation = RMS_NORM
    door = staticmethod(rms_norm)
    find_face = staticmethod(face_module)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(bad: float) -> None:
    x = torch.randn(5, 33)
    clean = rms_norm(x, torch.ones(33))
    x[2, 7] = bad
    y = rms_norm(x, torch.ones(33))
    rest = [0, 1, 3, 4]
    assert torch.equal(y[rest], clean[rest])
    assert y[2].isnan().any()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e6, 1e18])
@pytest.mark.parametrize(
    "face", [face for face in faces_on("cpu", available_faces("rms_norm")) if face != "triton"]
)
def test_rows_of_any_size(face: str, size: float) -> None:
    """Where eps is most of the divisor, and where it is nothing."""
    x, weight = torch.randn(4, 33) * size, torch.randn(33)
    y = rms_norm(x, weight, face=face)
    truth = rms_norm(x.double(), weight.double(), face="reference")
    assert float((y - truth).abs().max()) <= 1e-6 * float(truth.abs().max())


def test_float16_does_not_overflow() -> None:
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # its square is over 65,504
    y = rms_norm(x, torch.ones(64, dtype=torch.float16))
    torch.testing.assert_close(y, torch.ones_like(y))


def test_more_dimensions() -> None:
    x, weight = torch.randn(2, 3, 4, 8), torch.randn(8)
    assert torch.equal(rms_norm(x, weight), rms_norm(x.view(-1, 8), weight).view_as(x))


def test_weight_of_another_dtype() -> None:
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    weight = torch.randn(8, requires_grad=True)
    y = rms_norm(x, weight)
    y.sum().backward()
    assert (y.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.slow
def test_inductor() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight).sin().sum()

    torch.compiler.reset()
    function(x, weight).backward()
    eager, x.grad = x.grad, None
    torch.compile(function, fullgraph=True)(x, weight).backward()
    torch.testing.assert_close(x.grad, eager)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 3), torch.ones(4), r"weight must have shape \(3\), got \(4,\)"),
        (torch.ones(2, 3).int(), torch.ones(3), "x must be floating point .*, got torch.int32"),
        (torch.ones(()), torch.ones(1), "at least one dimension, got a scalar"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), "weight on meta"),
        ([1.0], torch.ones(1), r"x must be a tensor, got \[1.0\]"),
    ],
)
def test_bad_input(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight)
