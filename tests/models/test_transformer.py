"""The transformer as a whole: causality, loss, gradients, recomputation, compilation, autocast."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pyllm.layers import LocalDispatcher
from pyllm.models import ModelConfig, Transformer

TINY = ModelConfig(
    vocab_size=61, max_seq_len=32, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=24
)
CONFIGS = {
    "modern": TINY,
    "gpt": replace(TINY, norm="layer", position="learned", activation="gelu", n_kv_heads=4),
    "window": replace(TINY, window=4),
    "sinks": replace(TINY, window=4, attention_sinks=2),
    "one kv head": replace(TINY, n_kv_heads=1),
    "shared, bias": replace(TINY, n_shared_experts=1, router_bias=True),
    "yarn": replace(TINY, rope_scaling="yarn", rope_factor=4.0, rope_original_len=8),
    "sinusoidal": replace(TINY, position="sinusoidal"),
    "dense": replace(TINY, moe_every=0),
    "hybrid": replace(TINY, moe_every=2),
    "untied": replace(TINY, tie_embeddings=False),
}


def make_model(config: ModelConfig = TINY) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


def make_batch(config: ModelConfig = TINY, batch: int = 2, n_tokens: int = 20):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (batch, n_tokens + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def total_loss(output):
    return output.loss + 0.01 * output.balance_loss + 0.001 * output.z_loss


def gradients(model: Transformer, inputs, targets) -> dict[str, torch.Tensor]:
    model.zero_grad()
    total_loss(model(inputs, targets)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_loss_is_the_cross_entropy_of_the_logits(config):
    model = make_model(config)
    inputs, targets = make_batch(config)
    logits = model(inputs).logits
    assert logits.shape == (2, 20, 61)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(model(inputs, targets).loss, wanted.mean())
    each = model(inputs, targets, reduction="none").loss
    torch.testing.assert_close(each, wanted.view(2, 20))
    masked = targets.clone()
    masked[0, :15] = -100
    torch.testing.assert_close(model(inputs, masked).loss, wanted[15:].mean())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_no_position_sees_a_later_one_and_all_matter_to_the_last(config):
    model = make_model(config).eval()
    inputs, _ = make_batch(config, batch=1)
    plain = model(inputs).logits
    other = inputs.clone()
    other[0, 10] = (other[0, 10] + 1) % config.vocab_size
    changed = (model(other).logits - plain).abs().amax(-1)[0]
    torch.testing.assert_close(changed[:10], torch.zeros(10), rtol=0, atol=1e-6)
    reach = 1 + (config.n_layers * (config.window - 1) if config.window else 9)
    assert (changed[10 : 10 + reach] > 1e-6).all()
    assert (changed[10 + reach :] < 1e-6).all()


def test_sinks_stay_in_sight():
    """One layer, so that nothing is handed on: the last position sees the first two and the
    last four."""
    model = make_model(replace(CONFIGS["sinks"], n_layers=1)).eval()
    inputs, _ = make_batch(batch=1)
    plain = model(inputs).logits[0, -1]
    for at in range(19):
        other = inputs.clone()
        other[0, at] = (other[0, at] + 1) % TINY.vocab_size
        seen = not torch.allclose(model(other).logits[0, -1], plain, rtol=0, atol=1e-6)
        assert seen == (at < 2 or at >= 16), at


def test_sequences_of_a_batch_do_not_mix():
    model = make_model().eval()
    inputs, _ = make_batch(batch=3)
    whole = model(inputs).logits
    for row in range(3):
        torch.testing.assert_close(model(inputs[row : row + 1]).logits[0], whole[row])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_gets_a_gradient(config):
    model = make_model(config)
    for name, gradient in gradients(model, *make_batch(config)).items():
        assert gradient.isfinite().all() and (gradient != 0).any(), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_the_slope_of_the_loss(config):
    """Along one direction through all parameters, uphill and askew; with all experts chosen, so
    that no choice can flip on the way."""
    model = make_model(replace(config, top_k=config.n_experts))
    inputs, targets = make_batch(config, batch=4)
    slopes = gradients(model, inputs, targets)
    generator = torch.Generator().manual_seed(2)
    direction = {}
    for name, slope in slopes.items():
        noise = torch.randn(slope.shape, generator=generator)
        direction[name] = slope / slope.norm() + 0.3 * noise / noise.norm()
    wanted = sum((slopes[name] * direction[name]).sum() for name in slopes).item()

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += step * direction[name]
            loss = total_loss(model(inputs, targets)).item()
            for name, parameter in model.named_parameters():
                parameter -= step * direction[name]
        return loss

    step = 3e-3
    assert wanted > 0.1
    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    assert slope == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_recomputing_gives_the_same_gradients(config):
    model = make_model(config).train()
    batch = make_batch(config)
    plain = gradients(model, *batch)
    model.recompute = True
    for name, gradient in gradients(model, *batch).items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("name", ["modern", "gpt", "dense"])
def test_compiling_whole_gives_the_same_as_eager(name):
    model = make_model(CONFIGS[name])
    inputs, targets = make_batch()
    plain = model(inputs, targets)
    plain_gradients = gradients(model, inputs, targets)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(inputs, targets)
    torch.testing.assert_close(output.loss, plain.loss)
    assert torch.equal(output.tokens_per_expert, plain.tokens_per_expert)
    model.zero_grad()
    total_loss(output).backward()
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, plain_gradients[parameter_name], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_autocast_to_bfloat16_is_close(config):
    model = make_model(config)
    inputs, targets = make_batch(config)
    plain, plain_gradients = model(inputs, targets), gradients(model, inputs, targets)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(inputs, targets)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.01, atol=0.01)
    total_loss(output).backward()
    # Of the whole gradient: a choice of expert may flip where two logits are within rounding.
    error = wanted = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        error += (parameter.grad - plain_gradients[name]).square().sum().item()
        wanted += plain_gradients[name].square().sum().item()
    assert (error / wanted) ** 0.5 < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_in_half_precision_is_close(config, dtype):
    """With all experts chosen: a choice that flips within rounding is no error of arithmetic."""
    model = make_model(replace(config, top_k=config.n_experts)).eval()
    inputs, _ = make_batch(config)
    wanted = model(inputs).logits
    got = model.to(dtype)(inputs).logits
    assert got.dtype == dtype
    assert (got.float() - wanted).norm() / wanted.norm() < 0.03


def test_the_router_bias_moves_the_choice_and_not_the_weights():
    model = make_model(CONFIGS["shared, bias"]).eval()
    inputs, _ = make_batch(batch=8)
    counts = model(inputs).tokens_per_expert
    model.move_router_bias(counts, rate=0.002)
    moved = model(inputs).tokens_per_expert
    mean = counts.sum(1, keepdim=True) / counts.shape[1]
    busiest = counts.argmax(1, keepdim=True)
    assert (moved.gather(1, busiest) < counts.gather(1, busiest)).all()
    assert ((moved - mean).abs().sum(1) < (counts - mean).abs().sum(1)).all()
    # A bias alike for all experts chooses as none does, and weighs as none does.
    for block in model.blocks:
        block.ffn.router_bias.fill_(3.0)
    flat = model(inputs).logits
    for block in model.blocks:
        block.ffn.router_bias.zero_()
    torch.testing.assert_close(model(inputs).logits, flat)


def test_router_biases_need_a_model_that_has_them():
    with pytest.raises(ValueError, match="the model has none; set router_bias"):
        make_model().move_router_bias(torch.zeros(2, 8), 0.001)
    with pytest.raises(ValueError, match=r"tokens_per_expert must have shape \(2, 8\)"):
        make_model(CONFIGS["shared, bias"]).move_router_bias(torch.zeros(1, 8), 0.001)


def test_too_many_tokens_are_a_value_error():
    model = make_model()
    with pytest.raises(ValueError, match="33 tokens do not fit into the model's context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    cache = model.new_cache(1)
    cache.advance(30)
    with pytest.raises(ValueError, match="33 tokens do not fit"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)


def test_a_target_out_of_range_is_a_value_error():
    inputs, targets = make_batch()
    targets = targets.clone()
    targets[0, 0] = 61
    with pytest.raises(ValueError, match="between 0 and 60"):
        make_model()(inputs, targets)


def test_the_same_seed_makes_the_same_model():
    one, other = make_model().state_dict(), make_model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_mixture_is_handed_the_dispatcher():
    dispatcher = LocalDispatcher()
    model = Transformer(replace(TINY, moe_every=2), dispatcher)
    assert model.blocks[1].ffn.dispatcher is dispatcher
    assert not hasattr(model.blocks[0].ffn, "dispatcher")


def test_statistics_of_a_dense_model_are_empty():
    output = make_model(CONFIGS["dense"])(make_batch()[0])
    assert output.tokens_per_expert.shape == (0, 0)
    assert output.balance_loss == 0 and output.z_loss == 0
