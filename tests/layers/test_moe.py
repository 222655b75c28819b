"""The MoE layer: its router works in fp32, drops nothing, and hands its tokens to a dispatcher."""

import pytest
import torch

from pyllm.layers import MoE
from pyllm.ops import available_faces, moe_ffn


class FaceDispatcher:
    """All experts here, on one face."""

    def __init__(self, face: str) -> None:
        self.face = face

    def __call__(self, x_ND, w_in, w_out, weights_NA, experts_NA, activation):
        return moe_ffn(x_ND, w_in, w_out, weights_NA, experts_NA, activation, face=self.face)


def make_layer(activation="swiglu", n_experts=16, top_k=2, dispatcher=None, **options) -> MoE:
    layer = MoE(32, 24, n_experts, top_k, activation, dispatcher, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return layer


def by_hand(layer: MoE, x_BTD: torch.Tensor) -> torch.Tensor:
    """Every token on its own, every matrix product written out."""
    rows = []
    for x_D in x_BTD.flatten(0, 1):
        p_E = (layer.router @ x_D).softmax(-1)
        top = p_E.topk(layer.top_k)
        y_D = torch.zeros_like(x_D)
        for p, e in zip(top.values, top.indices, strict=True):
            pre = layer.w_in[e] @ x_D
            if layer.activation == "swiglu":
                gate, up = pre.chunk(2)
                hidden = gate * gate.sigmoid() * up
            else:
                hidden = torch.nn.functional.gelu(pre, approximate="tanh")
            y_D = y_D + p / top.values.sum() * (layer.w_out[e] @ hidden)
        rows.append(y_D)
    return torch.stack(rows).view_as(x_BTD)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_layer_is_what_its_equation_says(activation):
    layer = make_layer(activation)
    x = torch.randn(2, 7, 32)
    y, _ = layer(x)
    assert y.std() > 0.05
    torch.testing.assert_close(y, by_hand(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_shared_experts_run_for_every_token(activation):
    layer = make_layer(activation, n_shared=2)
    assert layer.shared.out_proj.weight.shape == (32, 48)
    x = torch.randn(2, 7, 32)
    wanted = by_hand(layer, x) + layer.shared(x)
    torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-4, atol=1e-5)


def test_biases_even_the_load_out():
    layer = make_layer(n_experts=8, router_bias=True)
    with torch.no_grad():
        layer.router[:2] += 0.2  # two favourites: the inputs have a mean
    x = torch.randn(4, 256, 32, generator=torch.Generator().manual_seed(0)) + 0.3
    before = layer(x)[1].tokens_per_expert
    for _ in range(300):
        layer.move_bias(layer(x)[1].tokens_per_expert, rate=0.002)
    after = layer(x)[1].tokens_per_expert
    assert before.max() > 2 * before.float().mean()
    assert after.max() < 1.1 * after.float().mean()
    assert "router_bias" in layer.state_dict()
    assert "router_bias" not in make_layer().state_dict()


def test_a_biased_choice_is_weighed_without_the_bias():
    layer = make_layer(n_experts=4, top_k=2, router_bias=True)
    x_D = torch.randn(32)
    p_E = (layer.router @ x_D).softmax(-1)
    chosen = p_E.argsort()[:2]  # the two that it would not have chosen
    layer.router_bias[chosen] = 1.0
    y_D = torch.zeros(32)
    for e in chosen:
        gate, up = (layer.w_in[e] @ x_D).chunk(2)
        y_D += p_E[e] / p_E[chosen].sum() * (layer.w_out[e] @ (gate * gate.sigmoid() * up))
    torch.testing.assert_close(layer(x_D.view(1, 1, 32))[0].view(32), y_D, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 200)])
def test_no_token_is_dropped(top_k, shape):
    _, statistics = make_layer(top_k=top_k)(torch.randn(*shape, 32))
    assert int(statistics.tokens_per_expert.sum()) == shape[0] * shape[1] * top_k


def test_no_token_is_dropped_when_all_want_the_same_expert():
    layer = make_layer(top_k=1)
    x = torch.randn(1, 1, 32).expand(4, 50, 32)
    y, statistics = layer(x)
    assert sorted(statistics.tokens_per_expert.tolist()) == [0] * 15 + [200]
    torch.testing.assert_close(y, by_hand(layer, x[:1, :1]).expand(4, 50, 32))


@pytest.mark.parametrize("face", available_faces("moe_ffn"))
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_an_expert_without_tokens_has_exactly_zero_gradient(face, activation):
    if face == "triton" and not torch.cuda.is_available():
        pytest.skip("the triton face needs a CUDA device here")
    layer = make_layer(activation, dispatcher=FaceDispatcher(face))
    y, statistics = layer(torch.randn(1, 3, 32))
    (y * torch.randn_like(y)).sum().backward()
    counts = statistics.tokens_per_expert
    assert (counts == 0).any() and (counts > 0).any()
    for weight in (layer.w_in, layer.w_out):
        for expert, count in enumerate(counts.tolist()):
            gradient = weight.grad[expert]
            assert gradient.isfinite().all()
            assert (gradient == 0).all() if count == 0 else (gradient != 0).any()


def test_the_gradients_are_those_of_the_equation():
    layer = make_layer()
    x = torch.randn(2, 5, 32, requires_grad=True)
    upstream = torch.randn(2, 5, 32)
    wanted_of = [x, *layer.parameters()]
    got = torch.autograd.grad(layer(x)[0], wanted_of, upstream)
    wanted = torch.autograd.grad(by_hand(layer, x), wanted_of, upstream)
    for one, other in zip(got, wanted, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_router_works_in_float32_under_autocast():
    layer = make_layer()
    x = torch.randn(4, 64, 32)
    seen = {}

    class Recorder(FaceDispatcher):
        def __call__(self, x_ND, w_in, w_out, weights_NA, experts_NA, activation):
            seen["weights"], seen["experts"] = weights_NA, experts_NA
            return super().__call__(x_ND, w_in, w_out, weights_NA, experts_NA, activation)

    layer.dispatcher = Recorder("reference")
    layer(x)
    plain = dict(seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    assert torch.equal(seen["experts"], plain["experts"])
    assert torch.equal(seen["weights"], plain["weights"])


def test_even_routing_has_a_balance_loss_of_one_and_a_skewed_one_more():
    layer = make_layer(n_experts=4, top_k=4)
    _, even = layer(torch.randn(2, 50, 32))
    assert even.balance_loss.item() == pytest.approx(1.0, abs=1e-5)
    layer.top_k = 1
    with torch.no_grad():
        layer.router.zero_()
        layer.router[2] = 1.0
    _, skewed = layer(torch.rand(2, 50, 32))
    assert skewed.balance_loss.item() > 3.9


def test_the_bias_stays_in_float32_whatever_the_model():
    layer = MoE(8, 4, 3, 1, "gelu", router_bias=True)
    layer.move_bias(torch.tensor([3, 0, 0]), 0.001)
    bias = layer.router_bias.clone()
    layer.bfloat16()
    assert layer.w_in.dtype == torch.bfloat16
    assert torch.equal(layer.router_bias, bias) and layer.router_bias.dtype == torch.float32
    layer(torch.randn(1, 5, 8, dtype=torch.bfloat16))
