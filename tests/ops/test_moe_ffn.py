"""``moe_ffn``: every face and the door, by its declaration; then what is particular to it."""

import pytest
import torch

from pyllm.ops import available_faces, moe_ffn
from pyllm.ops._registry import face_module
from pyllm.testing.cases.moe_ffn import MOE_FFN
from pyllm.testing.suite import OperationSuite


class TestMoeFfn(OperationSuite):
    operation = MOE_FFN
    door = staticmethod(moe_ffn)
    find_face = staticmethod(face_module)


def _inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    inputs = MOE_FFN.case(MOE_FFN.smoke[2]).make_inputs(dtype)
    inputs.pop("activation")
    return inputs


def test_an_expert_without_tokens_has_zero_gradient() -> None:
    inputs = _inputs()
    inputs["experts"] = inputs["experts"].clamp_max(2)
    w_in, w_out = inputs["w_in"].requires_grad_(), inputs["w_out"].requires_grad_()
    moe_ffn(**inputs).square().sum().backward()
    for gradient in (w_in.grad, w_out.grad):
        used = gradient.flatten(1).abs().amax(-1) > 0
        assert used.tolist() == [True] * 3 + [False] * 4


def test_an_expert_without_tokens_is_not_read() -> None:
    inputs = _inputs()
    inputs["experts"] = inputs["experts"].clamp_max(2)
    inputs["w_in"][3:] = float("nan")
    inputs["w_out"][3:] = float("nan")
    assert moe_ffn(**inputs).isfinite().all()


def test_nan_stays_with_its_token() -> None:
    inputs = _inputs()
    clean = moe_ffn(**inputs)
    inputs["x"][4] = float("nan")
    y = moe_ffn(**inputs)
    rest = torch.arange(len(y)) != 4
    # Another row changes no bit only where the products of a row do not depend on its neighbours.
    torch.testing.assert_close(y[rest], clean[rest])
    assert y[4].isnan().all()


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("face", available_faces("moe_ffn"))
def test_pre_activations_far_from_zero(face: str, activation: str) -> None:
    """Where the activation is 0 or the identity: up to 100, against the reference in float64."""
    case = MOE_FFN.case({**MOE_FFN.smoke[2], "act": activation})
    inputs = case.make_inputs(torch.float32)
    inputs["x"] *= 30
    assert (inputs["x"] @ inputs["w_in"][0].T).abs().max() > 50
    y = moe_ffn(**inputs, face=face)
    wide = {
        n: v.double() if getattr(v, "is_floating_point", bool)() else v for n, v in inputs.items()
    }
    truth = moe_ffn(**wide, face="reference")
    assert float((y - truth).abs().max()) <= 1e-5 * float(truth.abs().max())


def test_autocast_computes_in_its_dtype() -> None:
    inputs = _inputs()
    weights = inputs["w_in"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_ffn(**inputs)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be one of swiglu, gelu, got 'relu'"),
        ({"activation": "gelu"}, r"w_in must have shape \(7, 20, 33\), got \(7, 40, 33\)"),
        ({"x": torch.ones(17, 32)}, r"w_out must have shape \(E, 32, F\)"),
        ({"weights": torch.ones(16, 2)}, r"weights must have shape \(17, k\)"),
        ({"experts": torch.full((17, 2), 7)}, "between 0 and 6, got values from 7 to 7"),
        ({"experts": torch.ones(17, 2)}, "experts must be int32 or int64"),
        ({"x": torch.ones(17, 33).double()}, "one dtype was expected for all of its inputs"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe_ffn(**{**_inputs(), **change})
