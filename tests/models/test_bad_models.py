"""What a model is given and cannot work with is refused in one line, before it is worked on."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pyllm.models import ModelConfig, Transformer, count_flops, count_parameters

TINY = ModelConfig(
    vocab_size=11, max_seq_len=8, n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, d_ff=4
)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module")
def model():
    return Transformer(TINY).eval()


BAD_IDS = [
    (IDS - 2, "{} must be between 0 and 10, got values from -1 to 4"),
    (IDS + 5, "{} must be between 0 and 10, got values from 6 to 11"),
    (IDS + 2**40, "{} must be between 0 and 10, got values from 1099511627777"),
    (IDS.float(), "{} must be int32 or int64, got torch.float32"),
    (IDS.bool(), "{} must be int32 or int64, got torch.bool"),
    (IDS.to(torch.uint8), "{} must be int32 or int64, got torch.uint8"),
    (IDS.to("meta"), "one device was expected .*, got {} on meta, weights on cpu"),
    ([[1, 2, 3]], "{} must be a tensor, got "),
]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        *BAD_IDS,
        (IDS[0], r"{} must have shape \(B, T\), got \(3,\)"),
        (IDS[None], r"{} must have shape \(B, T\), got \(1, 2, 3\)"),
        (None, "{} must be a tensor, got "),
        (torch.zeros(1, 9, dtype=torch.long), "9 tokens do not fit into the model's context of 8"),
    ],
)
def test_input_ids(model, ids, message):
    with pytest.raises(ValueError, match=message.format("input_ids")):
        model(ids)
    with pytest.raises(ValueError, match=message.format("(input_ids|targets)")):
        model(ids, ids)
    with torch.no_grad(), pytest.raises(ValueError, match=message.format("input_ids")):
        model.hidden(ids, model.new_cache(2))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        *BAD_IDS,
        (IDS.t(), r"{} must have shape \(2, 3\), got \(3, 2\)"),  # as many, in another order
        (IDS.flatten(), r"{} must have shape \(2, 3\), got \(6,\)"),
        (IDS[:1], r"{} must have shape \(2, 3\), got \(1, 3\)"),
    ],
)
def test_targets(model, targets, message):
    cache = model.new_cache(2)
    with torch.no_grad(), pytest.raises(ValueError, match=message.format("targets")):
        model(IDS, targets, cache)
    assert cache.length == 0  # nothing was done yet


def test_int32_ids_are_fine(model):
    assert torch.equal(model(IDS.int()).logits, model(IDS).logits)
    assert torch.equal(model(IDS, IDS.int()).loss, model(IDS, IDS).loss)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'max'"):
        model(IDS, IDS, reduction="max")


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing_gives_nothing(model, shape):
    ids = torch.zeros(shape, dtype=torch.long)
    assert model(ids).logits.shape == (*shape, 11)
    output = model(ids, ids)
    assert output.loss == output.balance_loss == output.z_loss == 0


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (
            lambda model: model.new_cache(1),
            r"kv cache: .* shape \(1, T, 1, 4\), got \(2, 3, 1, 4\)",
        ),
        (
            lambda model: model.new_cache(3),
            r"kv cache: .* shape \(3, T, 1, 4\), got \(2, 3, 1, 4\)",
        ),
        (lambda model: model.new_cache(2, 2), "kv cache: 3 positions do not fit into 2"),
        (
            lambda model: model.new_cache(2, 0),
            "kv cache: max_length must be .* from 1 to .*, got 0",
        ),
        (lambda model: model.new_cache(-1), "kv cache: batch must be .* from 1 to .*, got -1"),
        (
            lambda model: Transformer(replace(TINY, n_layers=1)).new_cache(2),
            "kv cache: layer must be from 0 to 0, got 1",
        ),
        (
            lambda model: Transformer(replace(TINY, d_model=16)).new_cache(2),
            r"kv cache: .* shape \(2, T, 1, 8\), got \(2, 3, 1, 4\)",
        ),
    ],
)
@torch.no_grad()
def test_a_cache_that_does_not_fit(model, cache, message):
    with pytest.raises(ValueError, match=message):
        model(IDS, cache=cache(model))


def test_a_cache_and_recomputation_do_not_meet(model):
    """The block that is computed again would not be given the cache."""
    model.recompute = True
    model.train()
    try:
        with pytest.raises(ValueError, match="kv cache: gradients do not flow through it"):
            model(IDS, cache=model.new_cache(2))
    finally:
        model.recompute = False
        model.eval()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"d_ff": 10**9},
            r"of 960,000,001,456 parameters with .* takes 3,840.0 GB of memory, and this",
        ),
        ({"vocab_size": 2**31 - 1, "d_model": 128}, "parameters .* takes .* GB of memory"),
        ({"max_seq_len": 2**31 - 1}, "context of 2,147,483,647 tokens takes .* GB of memory"),
        ({"max_seq_len": 2**31 - 1, "position": "sinusoidal"}, "2,147,483,647 tokens takes .* GB"),
        ({"d_ff": 2**31 - 1, "d_model": 2**30}, r"is larger than any; expected at most 10,000,000"),
        ({"n_experts": 2**31 - 1, "d_ff": 10**6}, "is larger than any; expected at most 10,000,"),
    ],
)
def test_a_model_beyond_the_memory_is_refused_before_it_is_made(settings, message):
    config = replace(TINY, n_layers=5, **settings)
    assert count_parameters(config).total > 0
    with pytest.raises(ValueError, match=message):
        Transformer(config)


def test_without_memory_a_large_model_is_made():
    config = replace(TINY, d_ff=10**9)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config).total
    with FakeTensorMode():
        fake = Transformer(config)
        assert fake(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 11)


@pytest.mark.parametrize("config", [None, "moe-tiny", {"d_model": 8}])
def test_what_is_no_configuration(config):
    with pytest.raises(ValueError, match="Transformer: config must be a ModelConfig, got"):
        Transformer(config)


@pytest.mark.parametrize("n_tokens", [0, -1, 1.0, True])
def test_operations_of_no_tokens(n_tokens):
    with pytest.raises(ValueError, match=f"n_tokens must be a whole number .*, got {n_tokens}"):
        count_flops(TINY, n_tokens)


def test_the_check_of_the_ids_is_not_in_the_way_of_a_compiler(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS, IDS).loss, model(IDS, IDS).loss)
    with torch.device("meta"):
        meta = Transformer(TINY)
    assert meta(IDS.to("meta")).logits.shape == (2, 3, 11)
