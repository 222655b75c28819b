"""``int8_linear``: every face and the door, by its declaration; then what is particular to it."""

import importlib
import math
import warnings
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm.cpu_kernels.int8_linear import int8_linear_plain
from pyllm.ops import available_faces, int8_linear, quantize_int8
from pyllm.ops._registry import face_module
from pyllm.testing.cases.int8_linear import INT8_LINEAR
from pyllm.testing.suite import InferenceSuite, faces_on

FACES = faces_on("cpu", available_faces("int8_linear"))


class TestInt8Linear(InferenceSuite):
    operation = INT8_LINEAR
    door = staticmethod(int8_linear)
    find_face = staticmethod(face_module)


@pytest.mark.parametrize("face", FACES)
def test_by_hand(face: str) -> None:
    x = torch.tensor([[1.27, -0.5], [0.0, 0.0]])  # the first row: scale 0.01, 127 and -50
    weight = torch.tensor([[1, 2], [-127, 100]], dtype=torch.int8)
    scale = torch.tensor([2.0, 0.5])
    y = int8_linear(x, weight, scale, face=face)
    torch.testing.assert_close(y, torch.tensor([[0.54, -105.645], [0.0, 0.0]]))


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("width", [1, 63, 64, 65, 500, 131_072])
def test_sums_are_exact(face: str, width: int) -> None:
    """Where every scale is one, the result is the integer."""
    generator = torch.Generator().manual_seed(width)
    q = torch.randint(-127, 128, (7, width), generator=generator)
    q[:, 0] = 127
    weight = torch.randint(-128, 128, (9, width), generator=generator)
    y = int8_linear(q.double(), weight.to(torch.int8), torch.ones(9), face=face)
    assert torch.equal(y.long(), q @ weight.T)


@pytest.mark.parametrize("face", FACES)
def test_the_largest_width(face: str) -> None:
    """Every product at its largest; one more would not fit into int32."""
    width = 132_104
    weight = torch.full((1, width), -128, dtype=torch.int8)
    y = int8_linear(torch.full((2, width), -127.0).double(), weight, torch.ones(1), face=face)
    assert y.tolist() == [[width * 127 * 128]] * 2


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantize_input", [True, False])
def test_what_is_not_finite_stays_in_its_row(face: str, value: float, quantize_input: bool) -> None:
    x = torch.ones(8, 70)
    x[6, 69] = value
    weight = torch.ones(5, 70, dtype=torch.int8)
    y = int8_linear(x, weight, torch.ones(5), quantize_input=quantize_input, face=face)
    assert y.isfinite().all(1).tolist() == [True] * 6 + [False, True]
    assert not y[6].isfinite().any()


def test_error_of_rounding() -> None:
    """About half a percent, as the docstring says, against the float product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=generator)
    weight = torch.randn(256, 512, generator=generator)
    exact = x @ weight.T
    errors = [
        float((int8_linear(x, *quantize_int8(weight), quantize_input=both) - exact).norm())
        / float(exact.norm())
        for both in (True, False)
    ]
    assert errors[1] < errors[0] < 0.015


def test_quantize_int8_and_back() -> None:
    weight = torch.randn(6, 33) * torch.tensor([1.0, 1e-3, 1e3, 0.0, 1.0, 5.0]).unsqueeze(1)
    q, scale = quantize_int8(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    assert q.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127]
    back = q * scale.unsqueeze(1)
    assert bool(((back - weight).abs() <= scale.unsqueeze(1) * 0.5001).all())


def test_quantize_int8_refuses() -> None:
    weight = torch.ones(4, 3)
    weight[2, 1] = math.nan
    with pytest.raises(ValueError, match="weight must be finite, got NaN or infinity in row 2$"):
        quantize_int8(weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(F, D\)"):
        quantize_int8(torch.ones(4))
    with pytest.raises(ValueError, match="weight must be floating point"):
        quantize_int8(torch.ones(4, 3).long())


BAD = [
    ({"x": torch.ones(2, 3, 4)}, r"x must have shape \(N, D\)"),
    ({"x": torch.ones(2, 4).long()}, "x must be floating point"),
    ({"x": torch.ones(2, 5)}, r"weight must have shape \(F, 5\), got \(3, 4\)"),
    ({"x": torch.ones(2, 4, device="meta")}, "one device was expected"),
    ({"x": [[1.0]]}, "x must be a tensor"),
    ({"weight": torch.ones(3, 4)}, "weight must be int8, got torch.float32"),
    ({"weight": torch.ones(3, 4, dtype=torch.uint8)}, "weight must be int8, got torch.uint8"),
    ({"weight": torch.ones(0, 4, dtype=torch.int8)}, r"\(F, 4\) with F of at least 1"),
    ({"weight": None}, "weight must be a tensor, got None"),
    ({"weight_scale": torch.ones(4)}, r"weight_scale must have shape \(3\), got \(4,\)"),
    ({"weight_scale": torch.ones(3, dtype=torch.int8)}, "weight_scale must be floating point"),
    ({"quantize_input": 1}, "quantize_input must be True or False, got 1"),
    ({"face": "triton"}, "has no face 'triton'"),
]


def _arguments(**changes: Any) -> dict[str, Any]:
    weight = torch.ones(3, 4, dtype=torch.int8)
    return {"x": torch.ones(2, 4), "weight": weight, "weight_scale": torch.ones(3), **changes}


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^int8_linear.*{message}"):
        int8_linear(**_arguments(**changes))


def test_too_wide_for_int32() -> None:
    x, weight = torch.ones(1, 132_105), torch.ones(1, 132_105, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"at most 132,104 wide, .* got \(1, 132105\); give quan"):
        int8_linear(x, weight, torch.ones(1))
    assert float(int8_linear(x, weight, torch.ones(1), quantize_input=False)) == 132_105


needs_cpu_face = pytest.mark.skipif("cpu" not in FACES, reason="pyllm._cpu is not built")


def _called_straight(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> bool:
    """Does the door go past PyTorch's dispatcher with these arguments, and with the same result?"""
    door = importlib.import_module("pyllm.ops.int8_linear")
    answers: list[torch.Tensor | None] = []

    def noting(*arguments: Any) -> torch.Tensor | None:
        answers.append(int8_linear_plain(*arguments))
        return answers[-1]

    monkeypatch.setattr(door, "int8_linear_plain", noting)
    arguments = _arguments(**changes)
    y = int8_linear(**arguments)
    expected = int8_linear(**arguments, face="reference")
    torch.testing.assert_close(y, expected)
    return any(answer is not None for answer in answers)


@needs_cpu_face
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_plain_tensors_go_straight_to_the_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = torch.ones(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert _called_straight(monkeypatch, x=torch.ones(2, 4, dtype=dtype), weight_scale=scale)


NOT_PLAIN = {
    "negated by a flag": {"x": torch.full((2, 4), 1 + 2j).conj().imag},
    "not contiguous": {"x": torch.ones(4, 2).T},
    "expanded": {"weight_scale": torch.ones(1).expand(3)},
    "a scale in another dtype": {"weight_scale": torch.ones(3).double()},
    "a parameter": {"weight_scale": torch.nn.Parameter(torch.ones(3), requires_grad=False)},
    "zeros without memory": {"x": torch._efficientzerotensor(2, 4)},
}


@needs_cpu_face
@pytest.mark.parametrize("name", NOT_PLAIN)
def test_other_tensors_do_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not _called_straight(monkeypatch, **NOT_PLAIN[name])


@needs_cpu_face
def test_nothing_goes_straight_where_something_listens() -> None:
    seen = []

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listener():
        int8_linear(**_arguments())
    assert "pyllm.int8_linear_forward.default" in seen
    fixed = _arguments()

    def by_x(x: torch.Tensor) -> torch.Tensor:
        return int8_linear(x, fixed["weight"], fixed["weight_scale"])

    graph = make_fx(by_x)(torch.ones(2, 4))
    assert any("int8_linear" in str(node.target) for node in graph.graph.nodes)
    several = torch.arange(40.0).view(5, 2, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        assert torch.equal(torch.vmap(by_x)(several), torch.stack([by_x(x) for x in several]))
    with pytest.raises(ValueError, match="no gradient flows through integers"):
        by_x(torch.ones(2, 4, requires_grad=True))
