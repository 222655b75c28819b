"""The error budget itself: what passes, what does not, and what the message says."""

import pytest
import torch

from pyllm.testing import Mismatch
from pyllm.testing.budget import compare, compare_exactly


def _judge(got: torch.Tensor, truth: torch.Tensor, **options: bool) -> None:
    compare("y", got, truth.float(), truth, torch.float32, **options)


def test_rounding_passes() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    _judge(truth.float(), truth)


def test_a_small_error_does_not() -> None:
    truth = torch.randn(100, dtype=torch.float64)
    with pytest.raises(Mismatch, match="y: error .* over the .* allowed"):
        _judge((truth + 1e-4).float(), truth)


def test_many_small_errors_show_in_the_norm() -> None:
    truth = torch.full((1000,), 1e-3, dtype=torch.float64)
    truth[0] = 1.0
    with pytest.raises(Mismatch, match="relative norm of the error"):
        _judge((truth + 9e-7).float(), truth)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad: float) -> None:
    truth = torch.randn(3, dtype=torch.float64)
    got = truth.float()
    got[1] = bad
    with pytest.raises(Mismatch, match="NaN or infinity"):
        _judge(got, truth)


def test_an_infinity_of_the_truth_is_expected() -> None:
    truth = torch.tensor([1.0, -float("inf")], dtype=torch.float64)
    _judge(truth.float(), truth)
    with pytest.raises(Mismatch, match="NaN or infinity"):
        _judge(torch.tensor([1.0, float("inf")]), truth)


def test_another_form() -> None:
    truth = torch.randn(3, dtype=torch.float64)
    with pytest.raises(Mismatch, match="dtype is torch.float64"):
        _judge(truth, truth)
    with pytest.raises(Mismatch, match="shape is"):
        _judge(truth.float()[:2], truth)


def test_an_ill_scaled_case_is_refused() -> None:
    truth = torch.full((3,), 1e-6, dtype=torch.float64)
    with pytest.raises(ValueError, match="ill-scaled, its largest entry is 1e-06"):
        _judge(torch.zeros(3), truth)
    _judge(torch.zeros(3), truth * 0, degenerate=True)


def test_a_degenerate_tensor_must_still_be_small() -> None:
    with pytest.raises(Mismatch, match="error"):
        _judge(torch.full((3,), 0.01), torch.zeros(3, dtype=torch.float64), degenerate=True)


def test_integers_are_exact() -> None:
    compare_exactly("order", torch.arange(3), torch.arange(3))
    with pytest.raises(Mismatch, match="order: 1 of 3 entries differ"):
        compare_exactly("order", torch.tensor([0, 1, 3]), torch.arange(3))
