"""``route_topk``: every face and the door, by its declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import available_faces, route_topk
from pyllm.ops._registry import face_module
from pyllm.testing.cases.route_topk import ROUTE_TOPK
from pyllm.testing.suite import OperationSuite


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


@pytest.mark.parametrize("face", available_faces("route_topk"))
def test_nan_counts_as_the_largest_and_the_lower_index_comes_first(face: str) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[1.0, nan, inf, nan], [inf, -inf, nan, inf], [nan, nan, nan, nan]])
    experts = route_topk(logits, 3, face=face).experts
    assert experts.tolist() == [[1, 3, 2], [2, 0, 3], [0, 1, 2]]
