"""``rope``: every face and the door, by its declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import rope
from pyllm.ops._registry import face_module
from pyllm.testing.cases.rope import ROPE
from pyllm.testing.suite import OperationSuite


class TestRope(OperationSuite):
    operation = ROPE
    door = staticmethod(rope)
    find_face = staticmethod(face_module)


def _table(n_tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.outer(torch.arange(n_tokens).float(), 100.0 ** -torch.linspace(0, 1, half))
    return angle.cos(), angle.sin()


def test_only_distances_matter() -> None:
    cos, sin = _table(12, 4)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(at_query: int, at_key: int) -> torch.Tensor:
        turned = [
            rope(x, cos[at : at + 1], sin[at : at + 1]) for x, at in ((q, at_query), (k, at_key))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(11, 9))


def test_lengths_are_kept() -> None:
    x = torch.randn(2, 5, 3, 8)
    torch.testing.assert_close(rope(x, *_table(5, 4)).norm(dim=-1), x.norm(dim=-1))


def test_nan_stays_in_its_head() -> None:
    x = torch.randn(2, 5, 3, 8)
    x[1, 2, 1, 0] = float("nan")
    bad = rope(x, *_table(5, 4)).isnan().any(-1)
    assert bad.nonzero().tolist() == [[1, 2, 1]]


@pytest.mark.parametrize(
    ("x", "tables", "message"),
    [
        (torch.ones(1, 5, 2, 7), _table(5, 3), "head size must be even, got 7"),
        (torch.ones(1, 5, 2, 8), _table(4, 4), r"cos must have shape \(5, 4\), got \(4, 4\)"),
        (torch.ones(5, 2, 8), _table(5, 4), r"x must have shape \(B, T, H, K\)"),
        (torch.ones(1, 5, 2, 8).long(), _table(5, 4), "x must be floating point"),
    ],
)
def test_bad_input(
    x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rope(x, *tables)
