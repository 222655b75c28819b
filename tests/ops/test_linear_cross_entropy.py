"""``linear_cross_entropy``: its faces and door, by declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import available_faces, linear_cross_entropy
from pyllm.ops._registry import face_module
from pyllm.testing.cases.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from pyllm.testing.suite import OperationSuite


class TestLinearCrossEntropy(OperationSuite):
    operation = LINEAR_CROSS_ENTROPY
    door = staticmethod(linear_cross_entropy)
    find_face = staticmethod(face_module)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_pytorch(reduction: str) -> None:
    x, weight = torch.randn(7, 8), torch.randn(11, 8)
    targets = torch.randint(11, (7,))
    targets[2] = -100
    expected = torch.nn.functional.cross_entropy(x @ weight.t(), targets, reduction=reduction)
    torch.testing.assert_close(
        linear_cross_entropy(x, weight, targets, reduction=reduction), expected
    )


def test_no_row_counts() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(5, 4), torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any()


def test_another_ignore_index() -> None:
    x, weight = torch.randn(2, 4), torch.randn(5, 4)
    targets = torch.tensor([3, 0])
    loss = linear_cross_entropy(x, weight, targets, ignore_index=0, reduction="none")
    assert loss[1] == 0 and loss[0] > 0


def test_nan_stays_in_its_row() -> None:
    x, weight, targets = torch.randn(6, 4), torch.randn(5, 4), torch.randint(5, (6,))
    x[3] = float("nan")
    loss = linear_cross_entropy(x, weight, targets, reduction="none")
    assert loss.isnan().nonzero().flatten().tolist() == [3]


def test_autocast_computes_in_its_dtype() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, torch.arange(6) % 5)
    loss.backward()
    rounded = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), torch.arange(6) % 5)
    assert loss.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(loss, rounded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 5])}, "targets must be between 0 and 4, got values"),
        ({"targets": torch.tensor([0.0, 1.0])}, "targets must be int32 or int64"),
        ({"targets": torch.tensor([0])}, r"targets must have shape \(2\), got \(1,\)"),
        ({"weight": torch.ones(5, 3)}, r"weight must have shape \(V, 4\), got \(5, 3\)"),
        ({"weight": torch.ones(5, 4).double()}, "one dtype was expected"),
        ({"reduction": "median"}, "reduction must be one of mean, sum, none, got 'median'"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    inputs = {"x": torch.ones(2, 4), "weight": torch.ones(5, 4), "targets": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**inputs, **change})


@pytest.mark.parametrize("face", available_faces("linear_cross_entropy"))
def test_logits_beyond_float16(face: str) -> None:
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    weight = torch.stack([torch.full((64,), 300.0), torch.full((64,), 299.0)]).half()
    loss = linear_cross_entropy(x, weight, torch.tensor([0, 1]), reduction="none", face=face)
    torch.testing.assert_close(loss, torch.tensor([0.0, 300.0 * 64]))


@pytest.mark.parametrize("target", [16, 10**11, -1])
@pytest.mark.skipif(
    "cpu" not in available_faces("linear_cross_entropy"), reason="the extension is not built"
)
def test_a_compiled_call_reads_no_foreign_memory(target: int) -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="targets must be between 0 and 15"):
        compiled(torch.randn(3, 8), torch.randn(16, 8), torch.tensor([0, target, 2]), face="cpu")
