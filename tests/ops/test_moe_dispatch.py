"""``moe_dispatch``: every face and the door, by its declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import moe_combine, moe_dispatch
from pyllm.ops._registry import face_module
from pyllm.testing.cases.moe_dispatch import MOE_DISPATCH
from pyllm.testing.suite import OperationSuite


class TestMoeDispatch(OperationSuite):
    operation = MOE_DISPATCH
    door = staticmethod(moe_dispatch)
    find_face = staticmethod(face_module)


def test_by_hand() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0]])
    experts = torch.tensor([[2, 0], [0, 1], [2, 1]])
    result = moe_dispatch(x, experts, 4)
    assert result.rows.flatten().tolist() == [1, 2, 2, 3, 1, 3]
    assert result.order.tolist() == [1, 2, 3, 5, 0, 4]
    assert result.position.tolist() == [[4, 0], [1, 2], [5, 3]]
    assert result.offsets.tolist() == [0, 2, 4, 6, 6]


def test_nan_stays_with_its_token() -> None:
    x = torch.randn(4, 3)
    x[1] = float("nan")
    rows = moe_dispatch(x, torch.tensor([[0], [1], [0], [1]]), 2).rows
    assert rows.isnan().any(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("x", "experts", "message"),
    [
        (torch.ones(2, 3), torch.ones(2), "experts must be int32 or int64, got torch.float32"),
        (torch.ones(2, 3), torch.ones(3, 1).int(), r"experts must have shape \(2, k\)"),
        (torch.ones(2, 3), torch.tensor([[0], [4]]), "between 0 and 3, got values from 0 to 4"),
        (torch.ones(2, 3), torch.tensor([[0], [-1]]), "between 0 and 3, got values from -1 to 0"),
        (torch.ones(2), torch.ones(2, 1).int(), r"x must have shape \(N, D\), got \(2,\)"),
    ],
)
def test_bad_input(x: torch.Tensor, experts: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_dispatch(x, experts, 4)


def test_more_rows_than_int32_can_number() -> None:
    experts = torch.zeros(1, 1, dtype=torch.int32).expand(2**31, 1)
    with pytest.raises(ValueError, match=r"less than 2\*\*31 rows, got \(2147483648, 1\)"):
        moe_dispatch(torch.zeros(1, 4).expand(2**31, 4), experts, 3)


def test_a_position_that_is_no_permutation() -> None:
    position = torch.tensor([[0, 1], [1, 3]])
    with pytest.raises(ValueError, match="position must be a permutation, got 1 2 times"):
        moe_combine(torch.ones(4, 3), torch.ones(2, 2), position)
