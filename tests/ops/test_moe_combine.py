"""``moe_combine``: every face and the door, by its declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import available_faces, moe_combine
from pyllm.ops._registry import face_module
from pyllm.testing.cases.moe_combine import MOE_COMBINE
from pyllm.testing.suite import OperationSuite, faces_on


class TestMoeCombine(OperationSuite):
    operation = MOE_COMBINE
    door = staticmethod(moe_combine)
    find_face = staticmethod(face_module)


def test_by_hand() -> None:
    rows = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    position = torch.tensor([[2, 0], [1, 3]])
    assert moe_combine(rows, weights, position).flatten().tolist() == [50.25, 2010.0]


def test_nan_stays_with_its_token() -> None:
    rows = torch.randn(4, 3)
    rows[2] = float("nan")
    y = moe_combine(rows, torch.ones(2, 2), torch.tensor([[0, 2], [1, 3]]))
    assert y.isnan().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("face", faces_on("cpu", available_faces("moe_combine")))
def test_a_weight_of_zero_hides_no_nan(face: str) -> None:
    rows = torch.randn(4, 3)
    rows[2] = float("nan")
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    y = moe_combine(rows, weights, torch.tensor([[0, 2], [1, 3]]), face=face)
    assert y.isnan().all(-1).tolist() == [True, False]


@pytest.mark.parametrize(
    ("rows", "weights", "position", "message"),
    [
        (torch.ones(3, 2), torch.ones(2, 2), torch.ones(2, 2).int(), r"rows must have shape \(4"),
        (torch.ones(4, 2), torch.ones(2, 2), torch.ones(4).int(), "position must have shape"),
        (torch.ones(4, 2), torch.ones(2, 2), torch.ones(2, 2), "position must be int32 or int64"),
        (torch.ones(4, 2), torch.ones(2, 2), torch.full((2, 2), 4), "between 0 and 3"),
    ],
)
def test_bad_input(
    rows: torch.Tensor, weights: torch.Tensor, position: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        moe_combine(rows, weights, position)


def test_a_compiled_call_reads_no_foreign_memory() -> None:
    compiled = torch.compile(moe_combine, fullgraph=True, backend="aot_eager")
    rows, weights = torch.randn(4, 8), torch.rand(2, 2)
    with pytest.raises((ValueError, IndexError), match="position must be|out of bounds"):
        compiled(rows, weights, torch.tensor([[0, 1], [2, 10**6]], dtype=torch.int32))
