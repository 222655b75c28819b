"""Generation: the cache, the seed, the end of the text, the sliding context."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from pyllm.generate import (
    SamplingConfig,
    expert_trace,
    generate,
    generate_ids,
    generate_text,
    next_logits,
)
from pyllm.models import PRESETS, ModelConfig

from .small import SMALL, chain_model, make_model

SHAPES = {
    name: replace(
        config, **SMALL, n_heads=4, n_kv_heads=max(1, 4 * config.n_kv_heads // config.n_heads)
    )
    for name, config in PRESETS.items()
} | {
    "window": ModelConfig(**SMALL, window=5),
    "sinusoidal": ModelConfig(**SMALL, position="sinusoidal", norm="layer"),
    "dense gelu": ModelConfig(**SMALL, moe_every=0, activation="gelu"),
    "hybrid": ModelConfig(**SMALL, moe_every=2),
    "untied": ModelConfig(**SMALL, tie_embeddings=False),
    "one kv head, top-1": ModelConfig(**SMALL, n_kv_heads=1, top_k=1),
}
GREEDY = SamplingConfig(greedy=True, max_new_tokens=20)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_cache_gives_what_recomputing_from_scratch_gives(config):
    model = make_model(config)
    ids = torch.randint(config.vocab_size, (2, config.max_seq_len))
    cache = model.new_cache(2)
    with torch.inference_mode():
        for end in range(5, config.max_seq_len + 1):
            new = ids[:, cache.length : end]
            cached = next_logits(model, new, cache)
            scratch = model(ids[:, :end]).logits[:, -1]
            assert scratch.std() > 0.2
            torch.testing.assert_close(cached, scratch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_prompt_in_two_pieces_gives_what_it_gives_in_one(config):
    model = make_model(config)
    ids = torch.randint(config.vocab_size, (1, 20))
    with torch.inference_mode():
        cache = model.new_cache(1, 20)
        next_logits(model, ids[:, :9], cache)
        pieces = next_logits(model, ids[:, 9:], cache)
        whole = next_logits(model, ids, model.new_cache(1))
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_greedy_generation_is_argmax_without_a_cache():
    model = make_model(ModelConfig(**SMALL))
    ids = [3, 1, 4]
    for token in generate_ids(model, [3, 1, 4], GREEDY):
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert len(ids) == 3 + GREEDY.max_new_tokens


@pytest.mark.parametrize("n_prompt", [1, 31, 32, 33, 100])
def test_a_full_context_slides_to_its_second_half(n_prompt):
    model = make_model(ModelConfig(**SMALL))
    history = torch.randint(67, (n_prompt,)).tolist()
    seen = list(history)
    new_ids = generate_ids(model, list(history), replace(GREEDY, max_new_tokens=70))
    cut = n_prompt > 32
    with pytest.warns(UserWarning, match="looks back on 32") if cut else nullcontext():
        first = next(new_ids)
    for token in itertools.chain([first], new_ids):
        if len(seen) > 32:
            seen = history[-16:]
        assert token == int(model(torch.tensor([seen])).logits[0, -1].argmax())
        history.append(token)
        seen.append(token)
    assert len(history) == n_prompt + 70


def test_a_context_of_one_token_still_generates():
    model = make_model(replace(ModelConfig(**SMALL), max_seq_len=1))
    assert len(list(generate_ids(model, [5], GREEDY))) == GREEDY.max_new_tokens


def test_the_same_seed_writes_the_same_and_another_one_does_not():
    model = make_model(ModelConfig(**SMALL))
    config = SamplingConfig(seed=7, temperature=1.5, max_new_tokens=30)
    first, again = (list(generate_ids(model, [1], config)) for _ in range(2))
    assert first == again
    assert first != list(generate_ids(model, [1], replace(config, seed=8)))
    unseeded = replace(config, seed=None)
    assert list(generate_ids(model, [1], unseeded)) != list(generate_ids(model, [1], unseeded))


def test_generation_leaves_the_global_generator_and_inference_mode_alone():
    model = make_model(ModelConfig(**SMALL))
    before = torch.get_rng_state()
    for _ in generate_ids(model, [1], SamplingConfig(max_new_tokens=3)):
        assert not torch.is_inference_mode_enabled()
    assert torch.equal(before, torch.get_rng_state())


def test_the_text_stops_at_end_of_text_and_streams_whole_characters(tokenizer):
    text = "Once é🦊."
    ids = tokenizer.encode(text)
    model = chain_model(tokenizer, ids)
    config = SamplingConfig(greedy=True, max_new_tokens=60)
    pieces = list(generate(model, tokenizer, "", config))
    assert "".join(pieces) == text
    assert "🦊" in pieces and all(pieces)
    assert generate_text(model, tokenizer, "Once", config) == text.removeprefix("Once")


def test_a_text_cut_inside_a_character_ends_with_a_replacement(tokenizer):
    model = chain_model(tokenizer, tokenizer.encode("a🦊"))
    pieces = list(generate(model, tokenizer, "", SamplingConfig(greedy=True, max_new_tokens=3)))
    assert pieces == ["a", "\ufffd"]


def test_special_tokens_in_a_prompt_are_text(tokenizer):
    model = make_model(replace(ModelConfig(**SMALL), vocab_size=tokenizer.vocab_size))
    prompt = "<|endoftext|> x"
    config = SamplingConfig(seed=0, max_new_tokens=5)
    ids = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
    assert ids.count(tokenizer.end_of_text_id) == 1
    expected = list(generate_ids(model, ids, config, stop_id=tokenizer.end_of_text_id))
    assert generate_text(model, tokenizer, prompt, config) == tokenizer.decode(expected)


def test_an_empty_prompt_a_wrong_id_and_a_foreign_tokenizer_are_value_errors(tokenizer):
    model = make_model(ModelConfig(**SMALL))
    with pytest.raises(ValueError, match="at least one token to begin with"):
        next(generate_ids(model, [], GREEDY))
    with pytest.raises(ValueError, match="token 67 is not in the model's vocabulary of 67"):
        next(generate_ids(model, [1, 67], GREEDY))
    with pytest.raises(ValueError, match="the tokenizer has 2.. tokens and the model 67"):
        next(generate(model, tokenizer, "fox", GREEDY))


def test_damaged_weights_are_a_value_error():
    model = make_model(ModelConfig(**SMALL))
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="weights are damaged"):
        next(generate_ids(model, [1], GREEDY))


def test_the_expert_trace_names_the_experts_that_ran():
    config = replace(ModelConfig(**SMALL), moe_every=2, n_layers=4)
    model = make_model(config)
    dispatchers = [block.ffn.dispatcher for block in model.blocks[1::2]]
    ids = torch.randint(config.vocab_size, (20,)).tolist()
    trace = expert_trace(model, ids)
    assert trace.shape == (2, 20, 2) and trace.dtype == torch.int32
    counts = torch.stack([layer.flatten().bincount(minlength=8) for layer in trace])
    assert torch.equal(counts.int(), model(torch.tensor([ids])).tokens_per_expert)
    assert [block.ffn.dispatcher for block in model.blocks[1::2]] == dispatchers


def test_the_expert_trace_begins_with_the_heaviest_also_where_a_bias_chooses():
    config = replace(ModelConfig(**SMALL), router_bias=True, top_k=3)
    model = make_model(config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (30,), generator=generator).tolist()
    given = []
    for block in model.blocks:
        bias = torch.empty_like(block.ffn.router_bias).uniform_(-0.5, 0.5, generator=generator)
        block.ffn.router_bias.copy_(bias)
        inner = block.ffn.dispatcher

        def spied(x, w_in, w_out, weights, experts, activation, inner=inner):
            given.append((weights, experts))
            return inner(x, w_in, w_out, weights, experts, activation)

        block.ffn.dispatcher = spied
    trace = expert_trace(model, ids)
    assert len(given) == len(trace) == 3
    for layer, (weights_NA, experts_NA) in zip(trace, given, strict=True):
        assert torch.equal(layer.sort(-1).values, experts_NA.sort(-1).values)
        heaviest = experts_NA.gather(1, weights_NA.argmax(-1, keepdim=True))
        assert torch.equal(layer[:, :1], heaviest)
        assert not torch.equal(experts_NA[:, :1], heaviest), "the bias changes nothing here"


def test_the_expert_trace_puts_the_dispatchers_back_after_an_error():
    model = make_model(ModelConfig(**SMALL))
    dispatcher = model.blocks[0].ffn.dispatcher
    with pytest.raises(ValueError, match="do not fit into the model's context"):
        expert_trace(model, [1] * 33)
    assert model.blocks[0].ffn.dispatcher is dispatcher
    with pytest.raises(ValueError, match="at least one token"):
        expert_trace(model, [])


def test_the_expert_trace_of_a_dense_model_has_no_layers():
    model = make_model(replace(ModelConfig(**SMALL), moe_every=0))
    assert expert_trace(model, [1, 2, 3]).shape == (0, 3, 2)
