"""Which parameter goes by which rule, the schedule, and Muon against the SVD."""

import math
from dataclasses import replace

import pytest
import torch

from pyllm.models import ModelConfig, Transformer
from pyllm.train import Muon, TrainConfig
from pyllm.train.muon import orthogonalise
from pyllm.train.optimizer import learning_rate, make_optimizers

BLOCK_MATRICES = ("weight", "w_in", "w_out")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_decay_falls_on_block_matrices_only(tiny: ModelConfig, kind: str, family: str) -> None:
    if family == "gpt":
        tiny = replace(tiny, norm="layer", position="learned", activation="gelu", moe_every=2)
    tiny = replace(tiny, tie_embeddings=False)
    model = Transformer(tiny)
    optimizers = make_optimizers(model, TrainConfig(optimizer=kind, weight_decay=0.1))
    rule = {
        parameter: (type(optimizer).__name__, group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(rule) == len(list(model.parameters())), "a parameter without a rule, or with two"
    for name, parameter in model.named_parameters():
        in_block = name.startswith("blocks.")
        is_matrix = in_block and name.split(".")[-1] in BLOCK_MATRICES and "norm" not in name
        expected = ("Muon" if kind == "muon" else "AdamW", 0.1) if is_matrix else ("AdamW", 0.0)
        assert rule[parameter] == expected, name


def test_warmup_then_cosine() -> None:
    config = TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert learning_rate(1000, config) == pytest.approx(0.1)
    assert all(after < before for before, after in zip(rates[10:], rates[11:], strict=False))


def test_a_run_shorter_than_its_warmup() -> None:
    config = TrainConfig(max_steps=5, warmup_steps=10, learning_rate=1.0)
    assert learning_rate(4, config) == pytest.approx(0.5)
    assert learning_rate(0, replace(config, warmup_steps=0)) == 1.0


@pytest.mark.parametrize("shape", [(48, 48), (24, 64), (64, 24), (3, 16, 40), (3, 40, 16)])
def test_orthogonalise_against_the_svd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = orthogonalise(matrix)
    assert result.shape == matrix.shape and result.dtype == matrix.dtype
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    # In the basis of the matrix's own singular vectors the result must be nearly the identity.
    in_basis = u.mT @ result @ vh.mT
    lifted = in_basis.diagonal(dim1=-2, dim2=-1)
    large = s > 0.02 * s.amax(-1, keepdim=True)  # five steps don't lift the tiniest ones
    assert lifted[large].min() > 0.6 and lifted[large].max() < 1.3
    off = in_basis - torch.diag_embed(lifted)
    assert off.abs().max() < 0.1  # bfloat16 iterations
    exact = u @ vh
    cosine = (result * exact).sum((-2, -1)) / result.norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))
    assert cosine.min() > 0.95


def test_a_stack_is_its_matrices() -> None:
    torch.manual_seed(0)
    stack = torch.randn(4, 24, 16)
    separately = torch.stack([orthogonalise(matrix) for matrix in stack])
    torch.testing.assert_close(orthogonalise(stack), separately, atol=0.02, rtol=0.02)


def test_the_scale_of_the_gradient_does_not_matter() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 32)
    torch.testing.assert_close(
        orthogonalise(matrix * 1024), orthogonalise(matrix), atol=0.02, rtol=0.02
    )
    assert orthogonalise(torch.zeros(4, 8)).abs().max() == 0


def test_one_step_of_muon_by_hand() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(6, 10), torch.randn(2, 6, 10)
    weight = torch.nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, momentum = start.clone(), torch.zeros(6, 10)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        direction = orthogonalise(gradient + 0.9 * momentum)
        expected = expected - 0.1 * (0.2 * math.sqrt(10) * direction + 0.5 * expected)
        torch.testing.assert_close(weight.detach(), expected)


def test_the_update_is_as_large_as_adamws() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(64, 96))
    weight.grad = torch.randn(64, 96)
    Muon([weight], lr=1.0).step()
    assert 0.1 < weight.detach().square().mean().sqrt() < 0.3


def test_muon_solves_least_squares() -> None:
    torch.manual_seed(0)
    inputs, truth = torch.randn(256, 12), torch.randn(8, 12)
    targets = inputs @ truth.T
    weight = torch.nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([weight], lr=0.1)
    losses = []
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        optimizer.zero_grad()
        loss = (inputs @ weight.T - targets).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0]


def test_muon_leaves_alone_what_has_no_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    Muon([weight], weight_decay=0.5).step()
    assert torch.equal(weight.detach(), torch.ones(3, 4))


def test_muon_leaves_an_idle_expert_alone() -> None:
    """Its momentum fades, but orthogonalised it would be a full-size update at every step."""
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(2, 6, 8))
    optimizer = Muon([stack], lr=0.1, weight_decay=0.1)
    stack.grad = torch.randn(2, 6, 8)
    optimizer.step()
    after_one = stack.detach().clone()
    for _ in range(5):
        stack.grad = torch.randn(2, 6, 8)
        stack.grad[1] = 0
        optimizer.step()
    assert torch.equal(stack[1], after_one[1])
    assert not torch.equal(stack[0], after_one[0])


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"expected matrices or stacks of them, got shape \(5,\)"):
        Muon([torch.nn.Parameter(torch.ones(5))])
