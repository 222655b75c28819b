"""``route_topk``: every face and the door, by its declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import available_faces, route_topk
from pyllm.ops._registry import face_module
from pyllm.testing.cases.route_topk import ROUTE_TOPK
from pyllm.testing.suite import OperationSuite, faces_on


class TestRouteTopk(OperationSuite):
    operation = ROUTE_TOPK
    door = staticmethod(route_topk)
    find_face = staticmethod(face_module)


def test_ties_go_to_the_lower_index() -> None:
    routing = route_topk(torch.zeros(3, 5), 2)
    assert routing.experts.tolist() == [[0, 1]] * 3
    torch.testing.assert_close(routing.weights, torch.full((3, 2), 0.5))


def test_an_even_load_has_a_balance_loss_of_one() -> None:
    logits = torch.eye(4) * 3
    routing = route_topk(logits, 1)
    assert routing.tokens_per_expert.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(routing.balance_loss, torch.tensor(1.0))


def test_nan_stays_in_its_row() -> None:
    logits = torch.randn(4, 6)
    clean = route_topk(logits, 2).weights
    logits[1, 3] = float("nan")
    weights = route_topk(logits, 2).weights
    assert torch.equal(weights[[0, 2, 3]], clean[[0, 2, 3]])


def test_large_logits() -> None:
    routing = route_topk(torch.tensor([[1e4, -1e4, 0.0]]), 2)
    torch.testing.assert_close(routing.weights, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize(
    ("logits", "top_k", "message"),
    [
        (torch.ones(2, 3), 4, r"top_k must be at most the number of experts \(3\), got 4"),
        (torch.ones(2, 3), 0, "got 0"),
        (torch.ones(3), 1, r"logits must have shape \(N, E\), got \(3,\)"),
        (torch.ones(2, 3).long(), 1, "logits must be floating point .*, got torch.int64"),
    ],
)
def test_bad_input(logits: torch.Tensor, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route_topk(logits, top_k)


@pytest.mark.parametrize("top_k", [-1, 0, 4])
def test_the_cpu_face_writes_nowhere_else(top_k: int) -> None:
    if "cpu" not in available_faces("route_topk"):
        pytest.skip("pyllm._cpu is not built")
    with pytest.raises(ValueError, match=f"top_k must be from 1 to 3, got {top_k}"):
        torch.ops.pyllm.route_topk_forward(torch.randn(2, 3), None, top_k, "cpu")


@pytest.mark.parametrize("face", faces_on("cpu", available_faces("route_topk")))
def test_nan_counts_as_the_largest_and_the_lower_index_comes_first(face: str) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, nan, inf, nan], [inf, -inf, nan, inf], [nan, nan, nan, nan]])
    experts = route_topk(logits, 3, face=face).experts
    assert experts.tolist() == [[1, 3, 2], [2, 0, 3], [0, 1, 2]]


@pytest.mark.parametrize("face", faces_on("cpu", available_faces("route_topk")))
def test_nan_counts_as_the_largest_whatever_its_sign_and_its_other_bits(face: str) -> None:
    """0 / 0 has one sign on a processor and the other on a card."""
    logits = torch.tensor(
        [[float("inf"), 0, 1, 2, 3], [5, 4, float("-inf"), 2, 3], [1, 2, 3, 4, 5]]
    )
    nan = torch.tensor([0x7FC00000, -0x400000, 0x7FFFFFFF], dtype=torch.int32)
    logits.view(torch.int32)[2, 1:4] = nan
    logits.view(torch.int32)[0, 2], logits.view(torch.int32)[1, 3] = nan[0], nan[1]
    experts = route_topk(logits, 3, face=face).experts
    assert experts.tolist() == [[2, 0, 4], [3, 0, 1], [1, 2, 3]]


@pytest.mark.parametrize("face", faces_on("cpu", available_faces("route_topk")))
def test_zeros_of_either_sign_are_equal(face: str) -> None:
    logits = torch.tensor([[-1, -0.0, 0.0, -0.0], [0.0, -0.0, -1, 0.0]])
    assert route_topk(logits, 3, face=face).experts.tolist() == [[1, 2, 3], [0, 1, 3]]


@pytest.mark.parametrize("face", faces_on("cpu", available_faces("route_topk")))
def test_a_bias_decides_the_choice_and_not_the_weights(face: str) -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0, -200.0]]), torch.tensor([0.0, 0.0, 2.0, 3.0])
    routing = route_topk(logits, 2, bias=bias, face=face)
    assert routing.experts.tolist() == [[3, 2]]
    assert routing.weights.tolist() == [[0.0, 1.0]]
    # An expert whose probability is 0 in float32, alone: its weight is still 1.
    assert route_topk(logits, 1, bias=bias, face=face).weights.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(2), r"bias must have shape \(3\), got \(2,\)"),
        (torch.ones(3).long(), "bias must be floating point"),
        (torch.ones(3, device="meta"), "one device"),
    ],
)
def test_bad_biases(bias: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route_topk(torch.ones(2, 3), 1, bias=bias)
